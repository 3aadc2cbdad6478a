"""What tensor parallelism makes of a model on this host: `python -m benchmarks.ranks [--sizes 1 2]`.

An engine for each size, each with all CPUs, by turns; the others are paused. Of each round the median step, of the
rounds the median and the lowest. `--earlier FOLDER` adds two ranks of another checkout of this package.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.processes import Group, pipe

ROOT = Path(__file__).parents[1]
CASES = ((1, 32, 64), (8, 32, 32), (1, 1024, 0))  # sequences, tokens of each prompt, decode steps (0: time the prompt)
ROUNDS = 5


def measured(engine: Any, sequences: int, prompt: int, steps: int, seed: int) -> float:
    """Seconds of a decode step (median), or of the whole prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
    for i in range(sequences):
        tokens = [16 + (seed * 7919 + i * 104729 + j * 31) % 1000 for j in range(prompt)]
        engine.add_request(f"{time.monotonic()}-{i}", {"prompt_token_ids": tokens}, sampling)
    begin = time.perf_counter()
    engine.step()
    took = [time.perf_counter() - begin]
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        took.append(time.perf_counter() - begin)
    return statistics.median(took[2:-1]) if steps else took[0]


def work(folder: str, size: int) -> None:
    """Lines [sequences, prompt, steps, seed] are answered by seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16"}
    llm = LLM(folder, tensor_parallel_size=size, max_model_len=2048, enable_prefix_caching=False, **options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(measured(llm.llm_engine, *json.loads(line)), file=answers, flush=True)


def ask(group: Group, case: tuple[int, ...], seed: int) -> float:
    question, answer = pipe(group)
    with group.on_turn():
        question.write(json.dumps([*case, seed]) + "\n")
        question.flush()
        line = answer.readline()
    if not line:
        raise RuntimeError(group.last_words())
    return float(line)


def compare(model: str, ways: dict[str, tuple[int, Path]], rounds: int) -> None:
    """Each way is a size and the checkout that it is of."""
    from benchmarks.models import checkpoint

    folder, logs = checkpoint(model), Path(tempfile.mkdtemp())
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    groups = {}
    with ExitStack() as stack:
        for way, (size, checkout) in ways.items():
            command = [sys.executable, __file__, "--worker", str(folder), "--sizes", str(size)]
            paths = os.pathsep.join([str(checkout), str(ROOT)])
            group = stack.enter_context(Group(command, {**env, "PYTHONPATH": paths}, logs / "log", pipes=True))
            if pipe(group)[1].readline() != "ready\n":
                raise RuntimeError(group.last_words())
            group.pause()
            groups[way] = group
        for case in CASES:
            times: dict[str, list[float]] = {way: [] for way in groups}
            for seed in range(rounds + 1):
                for way, group in groups.items():
                    times[way].append(ask(group, case, seed))
            sequences, prompt, steps = case
            what = f"decode step of {sequences}" if steps else f"prompt of {prompt}"
            for way, all_times in times.items():
                taken = all_times[1:]  # the first is to warm up
                print(f"{what}, {way}: {statistics.median(taken) * 1e3:.2f} ms (lowest {min(taken) * 1e3:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.sizes[0])
        return
    ways = {f"{size} rank{'s' if size > 1 else ''}": (size, ROOT) for size in options.sizes}
    if options.earlier:
        ways["2 ranks, earlier"] = (2, options.earlier.resolve())
    compare(options.model, ways, options.rounds)


if __name__ == "__main__":
    main()
