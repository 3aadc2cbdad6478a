"""What of --speculative-config is not supported: a sentence for each."""

from collections.abc import Iterator, Set
from importlib.util import find_spec
from typing import Any

from vllm.config import ParallelConfig, SpeculativeConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ms_models import registry

METHODS = ("ngram", "draft_model", "mtp")


def refusals(spec: SpeculativeConfig, parallel: ParallelConfig) -> Iterator[str]:
    """One sentence for each thing that was asked for and cannot be served; the draft's own config is not looked at."""
    if spec.method not in METHODS:
        yield f"--speculative-config with the method {spec.method} is not supported; use one of {', '.join(METHODS)}."
        return
    if spec.method == "ngram" and find_spec("numba") is None:
        yield "Speculation by n-grams needs numba, which is not installed; run `pip install numba`."
    draft, target = spec.draft_model_config, spec.target_model_config
    if spec.method == "mtp" and draft.model not in (target.model, target.model_weights):
        yield (
            f"--speculative-config takes {draft.model}'s layer that predicts further tokens (method mtp), but only the "
            f"one of the model itself is supported; leave `model` out, or name a draft of another architecture."
        )
    if spec.method == "draft_model":
        for architecture in draft.architectures:
            registry.check(architecture)
    if spec.rejection_sample_method != "standard":
        yield (
            f"rejection_sample_method={spec.rejection_sample_method!r} in --speculative-config is not supported; "
            "'standard' is."
        )
    ranks, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if stages > 1:  # vLLM's runner asks each stage for its draft, and only the last one has it
        yield f"--speculative-config is not supported with --pipeline-parallel-size {stages}; leave out one of them."
    if spec.draft_tensor_parallel_size not in (None, ranks):
        yield (
            f"draft_tensor_parallel_size={spec.draft_tensor_parallel_size} in --speculative-config is not supported: "
            f"the draft is split as the model is, over {ranks} ranks; leave it out."
        )
    for name, value in _options(spec):
        if value:
            yield f"{name} in --speculative-config is not supported yet; leave it out."


def _options(spec: SpeculativeConfig) -> Iterator[tuple[str, Any]]:
    """An option and a value that is true if it was used."""
    yield "parallel_drafting", spec.parallel_drafting
    yield "use_heterogeneous_vocab", spec.use_heterogeneous_vocab
    yield "num_speculative_tokens_per_batch_size", spec.num_speculative_tokens_per_batch_size
    yield "disable_padded_drafter_batch", spec.disable_padded_drafter_batch
    yield "disable_eagle_block_drop", spec.disable_eagle_block_drop
    yield "enable_adaptive_verification", spec.enable_adaptive_verification
    yield "use_local_argmax_reduction", spec.use_local_argmax_reduction
    yield "index_share_for_mtp_iteration", spec.index_share_for_mtp_iteration is not None
    yield "draft_load_config", spec.draft_load_config
    yield "attention_backend", spec.attention_backend
    yield "moe_backend", spec.moe_backend
    yield "kv_cache_dtype", spec.kv_cache_dtype


def check_cache(spec: SpeculativeConfig, draft_layers: Set[str], cache: KVCacheConfig) -> None:
    """ValueError for a draft whose attention layers are not in the model's first group of cache blocks.

    vLLM gives a draft model the blocks of that group: with other ones it would write over the model's cache.
    """
    groups = [number for number, group in enumerate(cache.kv_cache_groups) if draft_layers & set(group.layer_names)]
    if groups != [0]:
        raise ValueError(
            f"The draft {spec.draft_model_config.model} cannot serve this model: their attention layers need different "
            "caches (a sliding window in one of them); name a draft that attends in all layers as the model does in "
            "all of its own, or use the method ngram."
        )
