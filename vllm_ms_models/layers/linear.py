"""Linear layers, split over tensor-parallel ranks.

The classes differ only in which rows (outputs) and columns (inputs) of the checkpoint matrix a rank owns:

| class                      | rows         | columns      | result                         |
| -------------------------- | ------------ | ------------ | ------------------------------ |
| ReplicatedLinear           | all          | all          | whole on every rank            |
| ColumnParallelLinear       | 1/size       | all          | this rank's features           |
| MergedColumnParallelLinear | 1/size each  | all          | one tensor for each part       |
| GatedColumnParallelLinear  | 1/size each  | all          | activation(gate) * up          |
| QKVParallelLinear          | whole heads  | all          | q, k, v of this rank's heads   |
| RowParallelLinear          | all          | 1/size       | summed over the ranks          |

Fused layers read several checkpoint matrices; they are named one by one, so no other table of fused names exists. Where
the checkpoint has them fused already, one below the other, the one name stands for all.

All take the batch as well, for the adapters (LoRA) of its tokens. What these add comes from the same input, and joins
the product before anything else happens to it (activation, sum over the ranks, rounding).
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import mindspore as ms
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels import Addend, LowRank
from vllm_ms_models.layers.activation import gated_activation
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.quantization.base import Part

Names = Sequence[str] | str
"""Those of several matrices in the checkpoint, or that of one in which they lie one below the other."""


def column_part(
    name: str, in_features: int, out_features: int, group: Group, first: int = 0, whole: int | None = None
) -> Part:
    """This rank's share of the rows of a matrix; or of `out_features` rows, from `first` on, of one with `whole`."""
    size = group.share(out_features, f"The output size of {name}")
    begin = first + group.rank * size
    return Part(name, (whole or out_features, in_features), slice(begin, begin + size), slice(0, in_features))


def column_parts(names: Names, in_features: int, sizes: Sequence[int], groups: Sequence[Group]) -> list[Part]:
    """A part for each of `sizes`, whose rows the ranks of its group share."""
    if not isinstance(names, str):
        shares = zip(names, sizes, groups, strict=True)
        return [column_part(name, in_features, size, group) for name, size, group in shares]
    ends = list(accumulate(sizes))
    return [
        column_part(names, in_features, size, group, end - size, ends[-1])
        for size, end, group in zip(sizes, ends, groups, strict=True)
    ]


def parts_by_heads(
    name: str, in_features: int, kv_heads: int, size: int, sizes: tuple[int, int, int], groups: tuple[Group, Group]
) -> list[Part]:
    """Queries, keys and values of a matrix in which those of each KV head lie together; `groups` are those of the ranks
    that share queries, and KV heads. Each of the three is put together of rows here and there."""
    queries = sizes[0] // kv_heads  # rows of each KV head
    whole, step = sum(sizes), queries + 2 * size
    share, kv_share = sizes[0] // groups[0].size, kv_heads // groups[1].size
    first, last = groups[0].rank * share, (groups[0].rank + 1) * share
    own = range(groups[1].rank * kv_share, (groups[1].rank + 1) * kv_share)
    outputs = [
        [
            slice(head * step + max(first - head * queries, 0), head * step + min(last - head * queries, queries))
            for head in range(first // queries, -(-last // queries))
        ],
        [slice(head * step + queries, head * step + queries + size) for head in own],
        [slice(head * step + queries + size, (head + 1) * step) for head in own],
    ]
    return [
        Part(name, (whole, in_features), rows, slice(0, in_features), continues=number > 0)
        for output in outputs
        for number, rows in enumerate(output)
    ]


class Linear(Layer):
    """Storage and loading common to all of them."""

    def __init__(self, parts: Sequence[Part], bias: bool, context: ModelContext) -> None:
        super().__init__()
        self.scheme = context.quantization.linear(parts, bias, context.dtype)
        self.adapters: dict[int, LowRank] = {}  # by their numbers in a batch (`Adaptation`)

    def addend(self, x: Tensor, batch: Batch | None) -> Addend | None:
        """What the adapters of the batch's tokens add to the products with `x`; None if there is nothing to add."""
        if not self.adapters:
            return None
        if batch is None:
            raise ValueError(
                f"{self.scheme.parts[0].name} has an adapter, but was called without the batch, which says whose "
                "tokens have it; the model must pass `batch` to its linear layers."
            )
        if batch.adaptation is None:
            return None
        chosen = [self.adapters.get(number) for number in batch.adaptation.numbers]
        return kernels.get().reduce(x, batch.adaptation.rows, chosen) if any(chosen) else None

    def slots(self) -> Iterator[Slot]:
        return self.scheme.slots()

    def finish_loading(self) -> None:
        self.scheme.finish()


class ReplicatedLinear(Linear):
    """`[tokens, in_features]` -> `[tokens, out_features]`, the same on every rank."""

    def __init__(self, name: str, in_features: int, out_features: int, context: ModelContext, bias: bool = False):
        super().__init__([column_part(name, in_features, out_features, Group())], bias, context)

    def construct(self, x: Tensor, batch: Batch | None = None, dtype: ms.Type | None = None) -> Tensor:
        return self.scheme.multiply(x, dtype, self.addend(x, batch))


class ColumnParallelLinear(Linear):
    """`[tokens, in_features]` -> `[tokens, out_features / ranks]`."""

    def __init__(self, name: str, in_features: int, out_features: int, context: ModelContext, bias: bool = False):
        super().__init__([column_part(name, in_features, out_features, context.tensor_parallel)], bias, context)

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.scheme.multiply(x, addend=self.addend(x, batch))


class MergedColumnParallelLinear(Linear):
    """Several column-parallel matrices over one input, multiplied at once: a tuple of their results."""

    def __init__(self, names: Names, in_features: int, sizes: Sequence[int], context: ModelContext, bias: bool = False):
        groups = [context.tensor_parallel] * len(sizes)
        super().__init__(column_parts(names, in_features, sizes, groups), bias, context)

    def construct(self, x: Tensor, batch: Batch | None = None) -> tuple[Tensor, ...]:
        return self.scheme.multiply_split(x, self.addend(x, batch))


class GatedColumnParallelLinear(MergedColumnParallelLinear):
    """`activation(gate(x)) * up(x)`: `[tokens, in_features]` -> `[tokens, size / ranks]`; `names` are gate and up.

    `hidden_act` is the activation's name in config.json.
    """

    def __init__(
        self,
        names: tuple[str, str] | str,
        in_features: int,
        size: int,
        hidden_act: str,
        context: ModelContext,
        bias: bool = False,
    ):
        super().__init__(names, in_features, (size, size), context, bias)
        self.activation = gated_activation(hidden_act)

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.scheme.multiply_gated(x, self.activation, self.addend(x, batch))


class QKVParallelLinear(Linear):
    """Query, key and value projections of this rank's heads.

    With more ranks than KV heads, each KV head is held by `ranks / kv_heads` neighbouring ranks. `by_heads`: the one
    matrix has the queries of the first KV head, its key and its value, then those of the next (InternLM2).
    """

    def __init__(
        self,
        names: Names,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        context: ModelContext,
        bias: bool = False,
        by_heads: bool = False,
    ):
        group = context.tensor_parallel
        query, key = (names, names) if isinstance(names, str) else names[:2]
        heads = group.share(num_heads, f"The number of heads of {query}")
        if group.size > num_kv_heads and group.size % num_kv_heads:
            raise ValueError(
                f"The number of KV heads of {key} ({num_kv_heads}) does not divide the tensor parallel size "
                f"{group.size}; choose a --tensor-parallel-size that it divides, or one that divides it."
            )
        copies = max(1, group.size // num_kv_heads)
        kv_group = Group(group.rank // copies, group.size // copies)
        kv_heads = kv_group.share(num_kv_heads, f"The number of KV heads of {key}")
        sizes = num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size
        if by_heads:
            parts = parts_by_heads(query, in_features, num_kv_heads, head_size, sizes, (group, kv_group))
        else:
            parts = column_parts(names, in_features, sizes, (group, kv_group, kv_group))
        super().__init__(parts, bias, context)
        self.num_heads, self.num_kv_heads = heads, kv_heads

    def construct(self, x: Tensor, batch: Batch | None = None) -> tuple[Tensor, ...]:
        return self.scheme.multiply_split(x, self.addend(x, batch))


class RowParallelLinear(Linear):
    """`[tokens, in_features / ranks]` -> `[tokens, out_features]`, summed over the ranks; rank 0 adds the bias.

    Without `reduce` it is not summed: for a caller that adds more to this rank's summand first.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        context: ModelContext,
        bias: bool = False,
        reduce: bool = True,
    ):
        group = context.tensor_parallel
        size = group.share(in_features, f"The input size of {name}")
        columns = slice(group.rank * size, (group.rank + 1) * size)
        part = Part(name, (out_features, in_features), slice(0, out_features), columns)
        super().__init__([part], bias and group.rank == 0, context)
        self.group = group if reduce else Group()
        self.foreign_bias = [f"{name}.bias"] if bias and group.rank > 0 else []

    def slots(self) -> Iterator[Slot]:
        yield from self.scheme.slots()
        for name in self.foreign_bias:  # in the checkpoint, but not for this rank
            yield Slot(name, self.scheme.parts[0].shape[:1], lambda _: None, (slice(0, 0),), optional=True)

    def construct(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return self.group.all_reduce(self.scheme.multiply(x, addend=self.addend(x, batch)))
