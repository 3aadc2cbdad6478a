"""One engine in a process of its own, asked and answering in lines of JSON; the timing is the same for all.

Only the standard library: this runs in the environments of all engines.

Asked: {"do": "prepare", "case": {...}}, {"do": "run", "seed": 1}, {"do": "finish"}; answered {...} or {"error": "..."}.
Engines of vLLM also take {"do": "chat", "questions": [...], "tokens": 40}, answered {"answers": [...]}.
The first line, unasked, says that the engine is ready. Times are in seconds.
"""

import json
import os
import random
import sys
import time
import traceback
from abc import ABC, abstractmethod
from typing import Any, TextIO

Answer = dict[str, Any]


class Engine(ABC):
    """What a worker has to offer."""

    vocab_size: int
    model_seconds: float | None = None  # spent in the model since the start, where that can be told

    @abstractmethod
    def describe(self) -> Answer:
        """Versions, threads, load_seconds."""

    @abstractmethod
    def begin(self, prompts: list[list[int]], limit: int) -> None:
        """Take `prompts` in; none of them will grow beyond `limit` positions."""

    @abstractmethod
    def step(self) -> int:
        """One step of the engine; the number of tokens that came out."""

    @abstractmethod
    def end(self) -> None:
        """Forget all sequences."""

    def chat(self, questions: list[str], tokens: int) -> list[str]:
        """The greedy answer of at most `tokens` tokens to each question."""
        raise NotImplementedError("This engine is not asked questions.")


def prompts_of(case: Answer, vocab_size: int, seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(16, vocab_size) for _ in range(case["prompt"])] for _ in range(case["batch"])]


class Timer:
    """Runs the cases on an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.case: Answer = {}
        self.context = 0  # cached positions of each sequence

    def _begin(self, seed: int, length: int | None = None) -> None:
        """Take in the case's prompts, or equally many of `length` tokens."""
        case = self.case
        prompts = prompts_of(case, self.engine.vocab_size, seed)
        room = 1024 if case["keep"] else 2 * case["tokens"] + 64
        self.engine.begin([prompt[:length] for prompt in prompts], case["prompt"] + room)

    def _first_tokens(self) -> None:
        """Step until a step has a token for every sequence: then all prompts have been read."""
        while self.engine.step() != self.case["batch"]:
            pass
        self.context = self.case["prompt"]

    def _wake(self) -> None:
        """A little work that is not timed: while a process is paused, the system takes memory of its code away."""
        case = self.case
        if case["kind"] == "prefill":
            self._begin(seed=0, length=8)
            self._first_tokens()
            self.engine.end()
        elif case["keep"]:
            self.engine.step()
            self.context += 1
        # Other decoding reads its prompts first.

    def prepare(self, case: Answer) -> Answer:
        """Warm up; with `keep`, read the prompts that the runs go on from."""
        self.case = case
        self._begin(seed=0)
        self._first_tokens()
        for _ in range(3 if case["kind"] == "decode" else 0):
            self.engine.step()
            self.context += 1
        if not case["keep"]:
            self.engine.end()
        return {"prepared": case["name"]}

    def run(self, seed: int) -> Answer:
        """One timed run: decode {"seconds", "steps", "context"}, prefill {"seconds"}; with model and CPU seconds."""
        decode, keep = self.case["kind"] == "decode", self.case["keep"]
        self._wake()
        if decode and not keep:
            self._begin(seed)
            self._first_tokens()
        model, cpu = self.engine.model_seconds, time.process_time()
        context = self.context
        steps: list[float] = []
        start = last = time.perf_counter()
        if decode:
            for _ in range(self.case["tokens"] - 1):
                if self.engine.step() != self.case["batch"]:
                    raise RuntimeError("A decode step did not yield one token for each sequence.")
                now = time.perf_counter()
                steps.append(now - last)
                last = now
            self.context += len(steps)
        else:
            self._begin(seed)
            self._first_tokens()
            last = time.perf_counter()
        answer: Answer = {"seconds": last - start, "cpu_seconds": time.process_time() - cpu}
        if model is not None and self.engine.model_seconds is not None:
            answer["model_seconds"] = self.engine.model_seconds - model
        if decode:
            answer |= {"steps": steps, "context": context}
        if not keep:
            self.engine.end()
        return answer

    def finish(self) -> Answer:
        self.engine.end()
        return {"finished": self.case.get("name")}


def _private_stdout() -> TextIO:
    """Where answers go; whatever else is printed goes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def serve(make: type[Engine], spawned: float) -> None:
    """Answer until standard input ends. `make()` loads the engine; `spawned` is time.time() at the process's start."""
    answers = _private_stdout()

    def answer(values: Answer) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        engine = make()
        timer = Timer(engine)
        timer.prepare({"name": "first token", "kind": "prefill", "batch": 1, "prompt": 8, "tokens": 1, "keep": False})
        answer({"ready": engine.describe() | {"first_token_seconds": time.time() - spawned}})
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                answer(timer.prepare(request["case"]))
            elif request["do"] == "run":
                answer(timer.run(request["seed"]))
            elif request["do"] == "chat":
                answer({"answers": engine.chat(request["questions"], request["tokens"])})
            else:
                answer(timer.finish())
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
