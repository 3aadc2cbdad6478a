"""The checkpoint's tensors, by their names there, and the parameters of a mindformers network that they go to.

mindformers names parameters after Megatron: its classes have a table of both names (`weight_mapping`), and some of its
parameters are several tensors of a checkpoint in one, each put into its place by the parameter's own `weight_loader`
under a short name, its shard. Here the tables are read backwards, so that our loader can say what is missing, unknown
or of another shape before anything is read.
"""

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np

from vllm_ms_models.checkpoint.slots import Slot

# Of several projections in one matrix, in their order there: which one is it (`output_sizes`).
NUMBERS = {"q": 0, "k": 1, "v": 2, "gating": 0, "hidden": 1}
# Those of latent attention are of sizes that only the configuration has.
LATENT = ("q_down", "kv_down", "q_up", "kv_up")
DTYPES = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}


def checkpoint_name(network: Any, name: str) -> str:
    """What the checkpoint calls what `network.model` calls `name`."""
    found = name
    for theirs, ours in network.weight_mapping:
        found = found.replace(ours, theirs)
    if network.convert_name(found) != name:
        raise ValueError(f"mindformers' {type(network).__name__} has no name in the checkpoint for {name}.")
    return found


def slots(network: Any) -> Iterator[Slot]:
    """One for each tensor of the checkpoint that goes to a parameter of `network.model`."""
    from mindformers.parallel_core.inference.weights_utils import default_weight_loader

    seen = set()
    for path, cell in network.model.cells_and_names():
        for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False):
            if id(parameter) in seen:  # the head's matrix may be the embedding's
                continue
            seen.add(id(parameter))
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            for part, shard in _parts(network, name):
                rows = parameter.shape[:1] if shard is None else (_rows(network, cell, parameter, shard),)
                shape = (*rows, *parameter.shape[1:])
                yield Slot(checkpoint_name(network, part), shape, _load(parameter, loader, shard))


def _parts(network: Any, name: str) -> list[tuple[str, str | None]]:
    """Names in `network.model` of the tensors that the parameter `name` is made of, and their shards."""
    whole = {ours for _, ours in network.weight_mapping}
    parts = [
        (name.replace(parameter, part), shard)
        for parameter, part, shard in network.generate_mapping()
        if shard in (*NUMBERS, *LATENT) and parameter in name and parameter not in whole
    ]
    return list(dict.fromkeys(parts)) or [(name, None)]


def _rows(network: Any, cell: Any, parameter: Any, shard: str) -> int:
    """Rows of a shard's tensor in the checkpoint."""
    if shard in NUMBERS:
        return int(cell.output_sizes[NUMBERS[shard]])
    config = network.transformer_config
    down = {"q_down": config.q_lora_rank, "kv_down": config.kv_lora_rank + config.qk_pos_emb_head_dim}
    return int(down.get(shard, parameter.shape[0]))


def _load(parameter: Any, loader: Any, shard: str | None) -> Any:
    """A slot's `load`, which gives the parameter a copy of its own."""

    def load(source: np.ndarray) -> None:
        values = np.array(source, DTYPES[parameter.dtype])
        if shard is None:
            loader(parameter, values)
        else:
            loader(parameter, values, shard)

    return load
