"""docs/features.md from the tests: which feature of vLLM works with which family of models, and what is refused.

    python scripts/features.py           writes it
    python scripts/features.py --check   fails if it is not what would be written

Tests say by `@pytest.mark.feature(name, families=[...], refused=sentence)` what they show; the families are those of
the parameter `service` or `family` unless they are named. A name that is not in FEATURES is an error.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "features.md"

FAMILIES = {
    "qwen2": "Qwen2",
    "llama": "Llama, Mistral",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "deepseek_v3": "DeepSeek-V2, V3",
    "quantized": "quantized",
}
# Of their own kind, which write no text.
ENCODERS = {"bert": "BERT", "roberta": "RoBERTa", "xlm_roberta": "XLM-RoBERTa"}
SAME = {"mistral": "llama", "deepseek_v2": "deepseek_v3", "dense": "qwen2"}

FEATURES: dict[str, list[str]] = {
    "API": [
        "chat completions",
        "completions",
        "streaming",
        "Responses API",
        "Anthropic Messages API",
        "tokenize and detokenize",
        "models",
        "metrics",
        "health and load",
        "batches of chats",
        "requests that their client gives up",
        "generative scoring",
        "token-in token-out",
        "impossible requests are refused",
    ],
    "Commands": [
        "offline LLM",
        "vllm run-batch",
        "vllm bench serve",
        "vllm bench throughput",
        "vllm bench latency",
        "vllm chat",
        "vllm complete",
        "profiling",
    ],
    "Sampling": [
        "n > 1",
        "seed",
        "temperature",
        "top-k",
        "top-p",
        "min-p",
        "presence penalty",
        "frequency penalty",
        "repetition penalty",
        "logit bias",
        "allowed tokens",
        "bad words",
        "sampling parameters together",
        "min tokens",
        "max tokens",
        "stop strings",
        "stop tokens",
        "repetition detection",
        "beam search",
    ],
    "Log-probabilities": [
        "log-probabilities",
        "prompt log-probabilities",
        "log-probabilities of named tokens",
        "echo",
    ],
    "Structured output": ["JSON schema", "JSON object", "regex", "grammar", "choice", "structural tags"],
    "Chat": [
        "chat templates",
        "tool calling: the model's choice",
        "tool calling: required and named",
        "reasoning parsers",
        "thinking budget",
    ],
    "Scheduling and cache": [
        "chunked prefill",
        "prefix caching",
        "prefix caching with a salt",
        "preemption",
        "priority scheduling",
        "KV cache of int8",
    ],
    "Speculation": ["speculation by n-grams", "speculation by a draft model", "speculation by MTP layers"],
    "Several processes": ["tensor parallelism", "pipeline parallelism", "data and expert parallelism", "Ray"],
    "Other tasks and weights": ["LoRA", "embeddings", "classification", "rerank and score"],
}

ENCODER_FEATURES = [
    "embeddings of texts",
    "embeddings of tokens",
    "classification of texts",
    "classification of tokens",
    "pairs of texts: score and rerank",
    "encoders on two tensor-parallel ranks",
    "encoders in bfloat16 and float16",
    "encoders in W8A8",
]

# What no family has.
REFUSED = [
    "images and audio",
    "prompt embeddings",
    "sleep mode",
    "weight offloading",
    "KV transfer",
    "KV offloading",
    "expert load balancing",
    "context parallelism",
    "other speculation methods",
    "other attention backends",
    "transformers as model implementation",
    "quantizing while loading",
    "other profilers",
]

KNOWN = {*REFUSED, *ENCODER_FEATURES, *(feature for group in FEATURES.values() for feature in group)}

HEADER = """# Features

Which feature of vLLM works with which family of models. This page is written by `make docs` from the marks of the
tests, and a test compares it: *works* is shown by a test, through a real server and the real client, or through
vLLM's engine (`make test-all` runs them all); *refused* is a sentence, listed below; *not run* means that no test
shows it, not that it fails. Families share everything but their layers.
Models that read images have a page of their own, [multimodal.md](multimodal.md).

The columns of families are for CPUs; on Ascend nothing was run.
"""

NOTES = """
## What has no effect

* Compilation and CUDA-graph settings: nothing is compiled at run time on a CPU. (`--enforce-eager` has an effect on
  [Ascend](ascend.md#devices-of-a-server-and-memory).)
* `--async-scheduling`: always off. With it vLLM schedules the next step while a device computes the present one. Its
  runner hands tokens over through CUDA streams and events, which torch has not on a host without CUDA ("Tried to
  instantiate dummy base class Event"). With stand-ins for these, tried on the demo, the tokens are the same and steps
  are no quicker: with one rank the model runs in the engine's own thread, so that nothing can overlap, and with more
  the scheduler would take a CPU that the kernels use.
"""


@dataclass
class Shown:
    """What tests show of one feature, by family."""

    works: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)  # the sentence
    files: list[str] = field(default_factory=list)  # where, in the order of collection

    def cell(self, family: str) -> str:
        if family in self.works:
            return "works"
        return "refused" if family in self.refused else "not run"


class Marks:
    """A pytest plugin that reads the marks of what was collected."""

    def __init__(self) -> None:
        self.shown: dict[str, Shown] = defaultdict(Shown)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("feature"):
                self._add(item, *mark.args, **mark.kwargs)

    def _add(self, item: pytest.Item, name: str, families: list[str] | None = None, refused: str | None = None) -> None:
        if name not in KNOWN:
            raise pytest.UsageError(f"{item.nodeid}: the feature {name!r} is not in scripts/features.py")
        shown = self.shown[name]
        if families is None:
            families = [_family(item)] if refused is None else [*FAMILIES]
        for family in families:
            family = SAME.get(family, family)
            if family not in (ENCODERS if name in ENCODER_FEATURES else FAMILIES):
                raise pytest.UsageError(f"{item.nodeid}: the family {family!r} is not in scripts/features.py")
            if refused is None:
                shown.works.add(family)
            else:
                shown.refused.setdefault(family, refused)
        file = item.nodeid.split("::")[0]
        if refused is None and file not in shown.files:
            shown.files.append(file)


def _family(item: pytest.Item) -> str:
    parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    if str(parameters.get("kind", "")).startswith("w8a8"):
        return "quantized"
    return str(parameters["service"] if "service" in parameters else parameters["family"])


def collected() -> dict[str, Shown]:
    """From the files that have such marks; SystemExit if they cannot be collected."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.feature(" in file.read_text()]
    marks = Marks()
    options = ["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    status = pytest.main([*options, *files], plugins=[marks])
    if status != 0:
        raise SystemExit(f"The tests cannot be collected (pytest: {status}).")
    return marks.shown


def _link(file: str) -> str:
    return f"[{Path(file).parent.name}/{Path(file).name}](../{file})"


def page(shown: dict[str, Shown]) -> str:
    """The whole document."""
    lines = [HEADER]
    groups = [(group, features, FAMILIES) for group, features in FEATURES.items()]
    for group, features, families in (*groups, ("Encoders", ENCODER_FEATURES, ENCODERS)):
        columns = [*families.values(), "any, on Ascend", "shown by"]
        lines += [f"## {group}", "", f"| | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
        for feature in features:
            one = shown[feature]
            cells = [*map(one.cell, families), "not run", ", ".join(map(_link, one.files))]
            lines.append(f"| {feature} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What is refused", "", "| | the sentence |", "| --- | --- |"]
    for feature in [*(name for group in FEATURES.values() for name in group), *REFUSED]:
        lines += [f"| {feature} | {sentence} |" for sentence in dict.fromkeys(shown[feature].refused.values())]
    return "\n".join(lines) + "\n" + NOTES


def main(arguments: list[str]) -> int:
    text = page(collected())
    if "--check" not in arguments:
        TARGET.write_text(text)
        print(f"{TARGET.relative_to(ROOT)} was written.")
    elif not TARGET.exists() or TARGET.read_text() != text:
        print("docs/features.md is not what the tests show; run `make docs`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
