"""Requests that vLLM takes though they then end the engine, or are answered as a fault of the server: refused instead.

vLLM's server looks at numbers before; `LLM` and `AsyncLLM` do not.
"""

import sys
from collections.abc import Iterator
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

SEEDS = range(-(2**63), 2**63)  # of torch's generators
CONSTRAINTS = ("json", "regex", "choice", "grammar", "structural_tag")


def check_request(params: SamplingParams | PoolingParams) -> None:
    """Raises VLLMValidationError, which the server answers with the status 400."""
    if isinstance(params, SamplingParams):
        for parameter, problem in _problems(params):
            raise VLLMValidationError(f"{parameter} {problem}.", parameter=parameter)


def _problems(params: SamplingParams) -> Iterator[tuple[str, str]]:
    if params.seed is not None and params.seed not in SEEDS:
        yield "seed", f"must be from {SEEDS.start} to {SEEDS.stop - 1}, got {params.seed}"
    for token, bias in (params.logit_bias or {}).items():
        if bias != bias or sys.float_info.max < abs(bias) < float("inf"):
            yield "logit_bias", f"must be a number that a float can hold, got {bias!r:.40} for token {token}"
    structure = params.structured_outputs
    texts = {"stop": params.stop, "bad_words": params.bad_words, "extra_args": params.extra_args}
    if structure is not None:
        texts["structured_outputs"] = [getattr(structure, name, None) for name in CONSTRAINTS]
    for parameter, value in texts.items():
        for text in _texts(value):
            yield parameter, f"must be Unicode text, got the half of a surrogate pair in {text[:40]!a}"


def _texts(value: Any) -> Iterator[str]:
    """Strings anywhere in `value` that no UTF-8 can hold: the engine's process could not be sent them."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list | tuple):
            waiting += found
        elif isinstance(found, str) and not found.isascii() and any("\ud800" <= letter <= "\udfff" for letter in found):
            yield found
