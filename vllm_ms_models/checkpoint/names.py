"""Checkpoints that name the same tensors otherwise."""

from collections.abc import Sequence
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


def renamed(checkpoint: Checkpoint, prefixes: Sequence[tuple[str, str]]) -> Checkpoint:
    """`checkpoint` with what begins with the first of a pair beginning with the second, one pair after another."""
    if not prefixes:
        return checkpoint

    def ours(name: str) -> str:
        for theirs, own in prefixes:
            if name.startswith(theirs):
                name = own + name.removeprefix(theirs)
        return name

    return replace(checkpoint, tensors={ours(name): info for name, info in checkpoint.tensors.items()})
