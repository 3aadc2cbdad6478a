"""What is timed, and what of it counts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cost import Cost, Decoder

# The same for all engines of vLLM. 4096 and 2048 are its own defaults on a CPU, offline and serving.
MAX_MODEL_LEN = 17408
OFFLINE_BATCHED_TOKENS = 4096
SERVING_MODEL_LEN = 4096
SERVING_BATCHED_TOKENS = 2048
KV_GIB = 1


@dataclass(frozen=True)
class Case:
    """Fixed-size work: `kind` decode times steps after the first token, prefill the time to the first token.

    `keep`: the prompts are read once and each round goes on where the last one ended (long contexts).
    `repeats`: so many times as many rounds; one short run says little where the machine's speed changes within seconds.
    """

    name: str
    kind: str
    batch: int
    prompt: int
    tokens: int = 1
    keep: bool = False
    repeats: int = 1

    def message(self) -> dict[str, Any]:
        return asdict(self)

    def cost(self, shape: Decoder, run: Mapping[str, Any]) -> Cost:
        """What the timed part of one run needs at least; `run` is a worker's answer."""
        if self.kind == "prefill":
            return shape.prefill(self.prompt)
        steps = len(run["steps"])
        mean = run["context"] + (steps + 1) / 2  # `context`: cached positions before the first timed step
        step = shape.decode_step([mean] * self.batch)
        return Cost(step.bytes * steps, step.flops * steps, step.int8_ops * steps)

    def rate(self, run: Mapping[str, Any]) -> float:
        """Tokens per second of one run: prompt tokens of a prefill, generated ones of decoding."""
        tokens = self.prompt * self.batch if self.kind == "prefill" else self.batch * len(run["steps"])
        return tokens / run["seconds"]


STEPS = (
    Case("decode-1", "decode", 1, 128, 64, repeats=4),
    Case("decode-8", "decode", 8, 128, 64, repeats=3),
    Case("decode-32", "decode", 32, 128, 64, repeats=2),
    Case("prefill-128", "prefill", 1, 128, repeats=8),
    Case("prefill-1024", "prefill", 1, 1024, repeats=4),
    Case("prefill-8192", "prefill", 1, 8192),
    Case("decode-1-4k", "decode", 1, 4096, 32, keep=True, repeats=4),
    Case("decode-1-16k", "decode", 1, 16384, 32, keep=True, repeats=4),
)
QUICK = (
    Case("decode-1", "decode", 1, 32, 12),
    Case("decode-8", "decode", 8, 32, 12),
    Case("decode-32", "decode", 32, 32, 6),
    Case("prefill-128", "prefill", 1, 128),
    Case("prefill-1024", "prefill", 1, 1024),
    Case("decode-1-4k", "decode", 1, 4096, 8, keep=True),
)
LOAD, STARTUP, MIXED, ANSWERS = "load", "startup", "mixed", "answers"
NAMES = (*(case.name for case in STEPS), LOAD, STARTUP, MIXED, ANSWERS)


def steps(names: tuple[str, ...], quick: bool) -> list[Case]:
    """The fixed-size cases among `names`; `quick` has smaller ones of the same names, and leaves out the longest."""
    return [case for case in (QUICK if quick else STEPS) if case.name in names]
