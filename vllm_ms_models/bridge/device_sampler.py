"""The choice of tokens on a device, where vLLM's sampler would do nothing else with the logits."""

from typing import Any

import numpy as np
import torch
from mindspore import Tensor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_ms_models.bridge.tensors import to_torch
from vllm_ms_models.kernels import Sampling

_LEAST_TEMPERATURE = 1e-5  # vLLM's: below it a request is greedy

# What says that one of vLLM's processors has something to do.
_WORK = {LogitBiasLogitsProcessor: "biases", MinTokensLogitsProcessor: "min_toks", MinPLogitsProcessor: "min_p_count"}


def is_plain(metadata: SamplingMetadata) -> bool:
    """Whether nothing but temperatures, top-k and top-p is asked for: no log-probabilities, penalties or masks."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not (holder is not None and holder.has_tracked_requests())
        and not any(_has_work(each) for each in metadata.logitsprocs.all)
    )


def _has_work(processor: Any) -> bool:
    """Those that are not vLLM's own may always have."""
    name = _WORK.get(type(processor))
    return name is None or bool(getattr(processor, name))


def choose(logits: Tensor, metadata: SamplingMetadata, sampling: Sampling, draw: Any) -> torch.Tensor | None:
    """Tokens int64 `[rows]` for logits on the device; None if all of them would have to come to the host.

    `draw` is vLLM's `TopKTopPSampler`: it gets all logits, with -inf for what the device has left out, so that a seeded
    request gets the same token wherever the others are left out.
    """
    if metadata.all_greedy:
        return to_torch(sampling.argmax(logits))
    if metadata.top_k is None and metadata.top_p is None:
        return None
    assert metadata.temperature is not None
    greedy = metadata.temperature < _LEAST_TEMPERATURE
    temperature = torch.where(greedy, 1.0, metadata.temperature)
    asked = (None if given is None else _host(given, kind) for given, kind in _bounds(metadata))
    ids, values = map(to_torch, sampling.candidates(logits, _host(temperature, np.float32), *asked))
    left = torch.full(logits.shape, -torch.inf).scatter_(1, ids, values)
    drawn, _ = draw(left, metadata.generators, None, None)
    return torch.where(greedy, ids[:, 0], drawn)


def _bounds(metadata: SamplingMetadata) -> tuple[tuple[torch.Tensor | None, Any], ...]:
    return (metadata.top_k, np.int32), (metadata.top_p, np.float32)


def _host(values: torch.Tensor, kind: Any) -> Tensor:
    return Tensor.from_numpy(np.ascontiguousarray(values.numpy().astype(kind)))
