"""The checkpoint's tensors, by their names there, and the parameters of a mindformers network that they go to.

mindformers names parameters after Megatron: its classes have a table of both names (`weight_mapping`), and some of its
parameters are several tensors of a checkpoint in one, each put into its place by the parameter's own `weight_loader`
under a short name, its shard. Here the tables are read backwards, so that our loader can say what is missing, unknown
or of another shape before anything is read.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np

from vllm_ms_models.checkpoint.slots import Slot

# Of several projections in one matrix, in their order there: which one is it (`output_sizes`).
NUMBERS = {"q": 0, "k": 1, "v": 2, "gating": 0, "hidden": 1}
# Those of latent attention are of sizes that only the configuration has.
LATENT = ("q_down", "kv_down", "q_up", "kv_up")
# A stack of all experts' matrices -> the projections in it, by mindformers' names, and their shards.
STACKS = {"experts.weight1": {"gating": "w1", "hidden": "w3"}, "experts.weight2": {"linear_fc2": "w2"}}
# What is not in the table of every class whose models have it (GLM-4.5's norms of queries and keys).
FORGOTTEN = (
    (".self_attn.q_norm.", ".self_attention.q_layernorm."),
    (".self_attn.k_norm.", ".self_attention.k_layernorm."),
)
DTYPES = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}

Loader = Callable[..., None]


class Slice(np.ndarray[Any, Any]):
    """An array that can be asked as what safetensors reads is, by some of mindformers' loaders."""

    def get_shape(self) -> list[int]:
        return list(self.shape)


def checkpoint_name(network: Any, name: str) -> str:
    """What the checkpoint calls what `network.model` calls `name`."""
    pairs = [*network.weight_mapping, *(pair for pair in FORGOTTEN if pair not in network.weight_mapping)]
    found = _replaced(name, [(ours, theirs) for theirs, ours in pairs])
    if _replaced(found, pairs) != name:
        raise ValueError(f"mindformers' {type(network).__name__} has no name in the checkpoint for {name}.")
    return found


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def slots(network: Any) -> Iterator[Slot]:
    """One for each tensor of the checkpoint that goes to a parameter of `network.model`."""
    from mindformers.parallel_core.inference.weights_utils import default_weight_loader

    seen = set()
    for path, cell in network.model.cells_and_names():
        for name, parameter in cell.parameters_and_names(name_prefix=path, expand=False):
            if id(parameter) in seen:  # the head's matrix may be the embedding's, and experts' have two places
                continue
            seen.add(id(parameter))
            loader = partial(getattr(parameter, "weight_loader", default_weight_loader), parameter)
            if name.endswith(tuple(STACKS)):
                found = _experts(network, name, loader)
            else:
                found = _projections(network, cell, name, parameter, loader)
            for part, shape, put in found:
                dtype = DTYPES[parameter.dtype]
                yield Slot(checkpoint_name(network, part), shape, _load(put, dtype), itemsize=np.dtype(dtype).itemsize)


def _load(put: Loader, dtype: Any) -> Loader:
    """A slot's `load`: what mindformers keeps must be a copy, of the parameter's dtype."""
    return lambda source: put(np.array(source, dtype).view(Slice))


def _projections(
    network: Any, cell: Any, name: str, parameter: Any, loader: Loader
) -> Iterator[tuple[str, tuple[int, ...], Loader]]:
    """Of each tensor in `parameter`: its name in `network.model`, its shape, and what takes it."""
    whole = {ours for _, ours in network.weight_mapping}
    shards = {
        name.replace(theirs, ours): shard
        for theirs, ours, shard in network.generate_mapping()
        if shard in (*NUMBERS, *LATENT) and theirs in name and theirs not in whole
    }
    if not shards:
        yield name, tuple(parameter.shape), loader
    for part, shard in shards.items():
        shape = (_rows(network, cell, parameter, shard), *parameter.shape[1:])
        yield part, shape, lambda values, shard=shard: loader(values, shard)


def _rows(network: Any, cell: Any, parameter: Any, shard: str) -> int:
    """Rows of a shard's tensor in the checkpoint."""
    if shard in NUMBERS:
        # Shared experts have both in a matrix that is not split over ranks.
        return int(cell.output_sizes[NUMBERS[shard]] if hasattr(cell, "output_sizes") else parameter.shape[0] // 2)
    config = network.transformer_config
    down = {"q_down": config.q_lora_rank, "kv_down": config.kv_lora_rank + config.qk_pos_emb_head_dim}
    return int(down.get(shard, parameter.shape[0]))


def _experts(network: Any, name: str, loader: Loader) -> Iterator[tuple[str, tuple[int, ...], Loader]]:
    """As `_projections`, of a stack of experts' matrices."""
    config = network.transformer_config
    features, hidden = config.moe_ffn_hidden_size, config.hidden_size
    stack = next(end for end in STACKS if name.endswith(end))
    for expert in range(config.num_moe_experts):
        for projection, shard in STACKS[stack].items():
            part = name.replace(stack, f"experts.{expert}.{projection}.weight")
            shape = (hidden, features) if shard == "w2" else (features, hidden)
            yield part, shape, partial(loader, shard_id=shard, expert_id=expert)
