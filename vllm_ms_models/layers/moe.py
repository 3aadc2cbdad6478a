"""Mixture of experts (Shazeer et al., 2017): a router sends each token to a few of many gated feed-forward blocks.

How the router chooses is a `Routing` (kernels/routing.py), of which there are three kinds:

| function       | of                  | scores  | groups ranked by         | shares                           |
| -------------- | ------------------- | ------- | ------------------------ | -------------------------------- |
| `softmax_top_k`| Qwen3-MoE, Mixtral  | softmax | -                        | scores, made to sum to 1 or not  |
| `group_limited`| DeepSeek-V2         | softmax | best expert              | scores, times a factor           |
| `noaux_tc`     | DeepSeek-V3         | sigmoid | sum of best two experts  | scores, made to sum to a factor  |
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels import Routing, Weight
from vllm_ms_models.layers.activation import gated_activation
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import column_part
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.quantization.base import LinearScheme, Part, Unquantized


def softmax_top_k(top_k: int, renormalize: bool) -> Routing:
    """The most probable experts; `renormalize`: their shares sum to 1."""
    return Routing(top_k, renormalize)


def group_limited(top_k: int, groups: int, top_groups: int, scale: float, renormalize: bool = False) -> Routing:
    """DeepSeek-V2's `group_limited_greedy` (its `greedy` is that of one group); shares are multiplied by `scale`."""
    return Routing(top_k, renormalize, "softmax", scale, groups, top_groups, "max")


def noaux_tc(top_k: int, groups: int, top_groups: int, scale: float, renormalize: bool) -> Routing:
    """DeepSeek-V3's, whose gate has a bias (`MoE(correction_bias=True)`) that counts for the choice only."""
    return Routing(top_k, renormalize, "sigmoid", scale, groups, top_groups, "top2")


@dataclass(frozen=True)
class ExpertNames:
    """The names of a block's modules in the checkpoint, after the block's own."""

    gate: str = "gate"
    experts: str = "experts"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"
    shared: str = "shared_experts"


class Router(Layer):
    """Hidden states `[tokens, hidden]` -> ids int32 and shares float32 of each token's experts, `[tokens, top_k]`.

    Its matrix is never quantized; its logits are float32. With `bias` the checkpoint has a `{name}.bias` for them, with
    `correction_bias` a `{name}.e_score_correction_bias`. ValueError if `routing` does not fit the number of experts.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_experts: int,
        routing: Routing,
        context: ModelContext,
        correction_bias: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        routing.check(num_experts)
        self.name = name
        self.routing = routing
        self.kernels = kernels.get()
        self.scheme = Unquantized().linear([column_part(name, hidden_size, num_experts, Group())], bias, context.dtype)
        self.bias = Tensor.from_numpy(np.zeros(num_experts, np.float32)) if correction_bias else None

    def slots(self) -> Iterator[Slot]:
        yield from self.scheme.slots()
        if self.bias is not None:
            yield Slot(f"{self.name}.e_score_correction_bias", self.bias.shape, self._load_bias, itemsize=4)

    def _load_bias(self, source: np.ndarray) -> None:
        assert self.bias is not None
        self.bias.asnumpy()[...] = source  # shares memory with the tensor

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.choose_experts(self.scheme.multiply(x, ms.float32), self.routing, self.bias)


class MoE(Layer):
    """`[tokens, hidden]` -> `[tokens, hidden]`: each token's experts by their shares, plus the shared experts.

    An expert is a `GatedMLP` of `intermediate_size`; `shared_size` is the intermediate size of the shared experts, one
    `GatedMLP` that all tokens pass. The tensor- and data-parallel ranks share the experts (`ModelContext`): the tokens
    of all data-parallel ranks go to all of them. Experts can be quantized in every way that needs nothing but a
    kernel's weight; CheckpointError, after loading, for the others. With `stacked` all experts lie in one tensor for
    each projection, and they and the router have biases (quantization/stacked.py).
    """

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        routing: Routing,
        hidden_act: str,
        context: ModelContext,
        shared_size: int | None = None,
        correction_bias: bool = False,
        names: ExpertNames | None = None,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        names = names or ExpertNames()
        self.kernels = kernels.get()
        self.tensor_parallel, self.data_parallel = context.tensor_parallel, context.data_parallel
        self.activation = gated_activation(hidden_act)
        self.owned, columns = _share(num_experts, intermediate_size, context, prefix)
        # The ranks' products are summed: of an expert that all have a part of, the first adds the bias.
        self.adds_bias = columns.start == 0
        self.hidden_size, self.dtype = hidden_size, context.dtype
        gate = f"{prefix}.{names.gate}"
        self.gate = Router(gate, hidden_size, num_experts, routing, context, correction_bias, stacked)
        self.shared = None
        if shared_size is not None:
            shared = f"{prefix}.{names.shared}"
            self.shared = GatedMLP(shared, hidden_size, shared_size, hidden_act, context, reduce=False)
        self.schemes: list[tuple[LinearScheme, LinearScheme]] = []
        for expert in range(num_experts):
            every = f"{prefix}.{names.experts}"
            name, foreign = f"{every}.{expert}", expert not in self.owned
            shape = (intermediate_size, hidden_size)
            rows = slice(0, 0) if foreign else columns  # another rank's are asked for, but not read
            gate_up = [
                Part(f"{name}.{proj}", shape, rows, slice(0, hidden_size)) for proj in (names.gate_proj, names.up_proj)
            ]
            rows = slice(0, 0 if foreign else hidden_size)
            down = [Part(f"{name}.{names.down_proj}", shape[::-1], rows, columns)]
            if stacked:
                place = expert, num_experts, context.dtype
                stack: Callable[..., LinearScheme] = context.quantization.stacked
                pair = stack(f"{every}.gate_up_proj", gate_up, *place), stack(f"{every}.down_proj", down, *place)
            else:
                linear: Callable[..., LinearScheme] = context.quantization.linear
                pair = linear(gate_up, False, context.dtype), linear(down, False, context.dtype)
            self.schemes.append(pair)
        self.gate_up: list[Weight] = []  # of the owned experts, once they are loaded
        self.down: list[Weight] = []
        self.biases: tuple[Tensor | None, Tensor | None] = None, None

    def slots(self) -> Iterator[Slot]:
        for schemes in self.schemes:
            for scheme in schemes:
                yield from scheme.slots()

    def finish_loading(self) -> None:
        for schemes in self.schemes:
            for scheme in schemes:
                scheme.finish()
        self.schemes = [self.schemes[expert] for expert in self.owned]
        self.gate_up = [gate_up.kernel_weight() for gate_up, _ in self.schemes]
        self.down = [down.kernel_weight() for _, down in self.schemes]
        gate_up_bias, down_bias = (_biases(schemes) for schemes in zip(*self.schemes, strict=True))
        self.biases = gate_up_bias, down_bias if self.adds_bias else None

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        # Summands of this rank, as of the routed experts; of its own tokens, and not of everyone's.
        shared = self.shared(x, batch) if self.shared is not None else None
        alone = self.data_parallel.size == 1
        places = None if alone or batch is None else batch["ranks"]
        everyone = self.data_parallel.gather(x, places)
        ids, shares = self.gate(everyone)
        routed = self.kernels.experts(
            everyone,
            self.gate_up,
            self.down,
            ids,
            shares,
            self.activation,
            shared if alone else None,
            self.owned.start,
            *self.biases,
        )
        routed = self.data_parallel.sum_of_own(routed, places)
        if shared is not None and not alone:
            routed = routed + shared
        return self.tensor_parallel.all_reduce(routed)

    def idle(self, tokens: int) -> None:
        """Serve the other data-parallel ranks in a step in which this one has nothing but `tokens` rows of zeros."""
        if self.data_parallel.size > 1:
            nobody = Batch(Tensor.from_numpy(np.zeros(tokens, np.int64)), {})
            self.construct(mint.zeros((tokens, self.hidden_size), dtype=self.dtype), nobody)


def _biases(schemes: Sequence[LinearScheme]) -> Tensor | None:
    """Those of all experts, one row for each; None if they have none."""
    rows = [scheme.bias.asnumpy() for scheme in schemes if scheme.bias is not None]
    return Tensor.from_numpy(np.stack(rows)) if rows else None


def _share(experts: int, features: int, context: ModelContext, prefix: str) -> tuple[range, slice]:
    """The experts of this rank, and which of their intermediate features it has."""
    tensor, data = context.tensor_parallel, context.data_parallel.group
    group = Group(data.rank * tensor.size + tensor.rank, data.size * tensor.size)
    if not context.expert_parallel:
        size = group.share(features, f"The intermediate size of the experts of {prefix}")
        return range(experts), slice(group.rank * size, (group.rank + 1) * size)
    if experts < group.size:
        raise ValueError(
            f"The {experts} experts of {prefix} are fewer than the {group.size} ranks that --enable-expert-parallel "
            "divides them among; use fewer ranks, or leave it out."
        )
    return range(group.rank * experts // group.size, (group.rank + 1) * experts // group.size), slice(0, features)
