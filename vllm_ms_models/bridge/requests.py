"""Requests that vLLM would take and that then end the engine, and every other request with it: refused one by one.

vLLM's server looks at most of this before; `LLM` and `AsyncLLM` do not.
"""

import sys
from collections.abc import Iterator

from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

SEEDS = range(-(2**63), 2**63)  # of torch's generators


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
