"""Checkpoints that name the same tensors otherwise."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vllm_ms_models.checkpoint.index import Checkpoint

PREFIX = "model."
HEADS = ("lm_head.", "score.")

# A tensor of BERT's encoder, whatever its model is called in the checkpoint: `bert.`, `roberta.`, or not at all.
ENCODER = re.compile(r"(?:\w+\.)?((?:embeddings|encoder|pooler)\..*)")
# What the first checkpoints, made with TensorFlow, call the weights of norms.
NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


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


def of_encoder(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """`checkpoint` with the names of an encoder of BERT's kind, which `prefix` begins; heads keep theirs."""

    def ours(name: str) -> str:
        if match := ENCODER.fullmatch(name):
            name = prefix + match[1]
        for old, new in NORMS.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name

    return replace(checkpoint, tensors={ours(name): info for name, info in checkpoint.tensors.items()})


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
