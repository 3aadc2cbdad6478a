"""Checkpoints that name the same tensors otherwise."""

from collections.abc import Iterable
from dataclasses import replace

from vllm_ms_models.checkpoint.index import Checkpoint

PREFIX = "model."
HEADS = ("lm_head.", "score.")


def of_whole_model(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the names of a model with a head.

    A decoder that was saved without one (`Qwen2Model`; many embedding models are) has no `model.` before its names.
    What belongs to a head has none either way.
    """
    if any(name.startswith(PREFIX) for name in checkpoint.tensors):
        return checkpoint
    named = {name if name.startswith(HEADS) else PREFIX + name: info for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=named)


def with_wanted_names(checkpoint: Checkpoint, wanted: Iterable[str]) -> Checkpoint:
    """`checkpoint`, or the same `of_whole_model`, where that has some of the names that are `wanted` and it has none.

    So were the first OPT models saved, and any decoder without a head, which may be its embedding.
    """
    wanted = set(wanted)
    if not wanted.isdisjoint(checkpoint.tensors):
        return checkpoint
    whole = of_whole_model(checkpoint)
    return checkpoint if wanted.isdisjoint(whole.tensors) else whole
