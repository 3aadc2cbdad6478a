"""Checkpoints that name the same tensors otherwise."""

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
