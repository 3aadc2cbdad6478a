"""Linears and embeddings of mindone's models: first noted, then made as our own.

While a model is constructed, `nn.Dense` and the like only note their sizes: nothing is allocated, and nothing is filled
with random numbers. When all are there and have names, `replace` puts our layers in their places.
"""

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import Linear, RowParallelLinear, column_part


class NotedLinear(nn.Cell):
    """`nn.Dense` and `mint.nn.Linear`, which call their arguments differently."""

    def __init__(
        self,
        in_channels: int = 0,
        out_channels: int = 0,
        *options: Any,
        has_bias: bool = True,
        bias: bool = True,
        in_features: int = 0,
        out_features: int = 0,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(options) == 1 and isinstance(options[0], bool):  # mint's third argument
            options, bias = (), options[0]
        if options:
            raise ValueError(f"A linear of mindone with the arguments {options} is not supported.")
        self.in_features = in_channels or in_features
        self.out_features = out_channels or out_features
        self.has_bias = has_bias and bias


class NotedEmbedding(nn.Cell):
    """`nn.Embedding` and `mint.nn.Embedding`. A padding token's row is what the checkpoint has, as in transformers."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **_: Any) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx


class ColumnLinear(Linear):
    """The rows of `group`'s rank, of all rows; more ranks than rows of a kind share them (see `column_group`)."""

    def __init__(
        self, name: str, in_features: int, out_features: int, context: ModelContext, bias: bool, group: Group
    ) -> None:
        super().__init__([column_part(name, in_features, out_features, group)], bias, context)

    def construct(self, x: Tensor) -> Tensor:
        return self.scheme.multiply(x)


class Rows(Layer):
    """A layer of ours, which maps `[tokens, in]` to `[tokens, out]`, for any number of axes before the last."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def construct(self, x: Tensor) -> Tensor:
        *before, size = x.shape
        rows = x.view(-1, size) if x.is_contiguous() else x.contiguous().view(-1, size)
        result = self.inner(rows)
        return result.view(*before, result.shape[-1])


class Tokens(Layer):
    """An embedding of ours for ids with any number of axes."""

    def __init__(self, inner: VocabParallelEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def construct(self, ids: Tensor) -> Tensor:
        rows = self.inner(ids.view(-1))
        return rows.view(*ids.shape, rows.shape[-1])


def replace(cell: nn.Cell, make: Callable[[str, Any], nn.Cell | None], prefix: str = "") -> None:
    """Put what `make(name, noted)` gives in the place of each noted layer in `cell`, by its full name."""
    for name, part in list(cell.name_cells().items()):
        full = f"{prefix}{name}"
        if isinstance(part, NotedLinear | NotedEmbedding):
            _put(cell, name, make(full, part))
        else:
            replace(part, make, f"{full}.")


def _put(cell: Any, name: str, part: Any) -> None:
    if isinstance(cell, nn.CellList | nn.SequentialCell):
        cell[int(name)] = part
    else:
        setattr(cell, name, part)


class Maker:
    """Makes our layers for those that mindone's model has, split over ranks as the config's plan says.

    `heads` are the numbers of heads of queries, and of keys and values.
    """

    def __init__(self, context: ModelContext, plan: dict[str, str], heads: tuple[int, int], head_name: str) -> None:
        self.context = context
        self.plan = plan
        self.heads = heads
        self.head_name = head_name
        self.embedding: VocabParallelEmbedding | None = None
        self.tied = False

    def __call__(self, name: str, noted: Any) -> nn.Cell:
        if isinstance(noted, NotedEmbedding):
            self.embedding = VocabParallelEmbedding(name, noted.num_embeddings, noted.embedding_dim, self.context)
            return Tokens(self.embedding)
        sizes = noted.in_features, noted.out_features
        if name == self.head_name and not noted.has_bias:
            tied_to = self.embedding if self.tied else None
            return Rows(ParallelLMHead(name, sizes[1], sizes[0], self.context, tied_to))
        if self._kind(name) == "rowwise":
            return Rows(RowParallelLinear(name, *sizes, self.context, noted.has_bias))
        return Rows(ColumnLinear(name, *sizes, self.context, noted.has_bias, self._column_group(name)))

    def _kind(self, name: str) -> str | None:
        """What the plan says of a linear; its patterns have a star for a layer's number, and no `model.` before."""
        short = ".".join("*" if part.isdecimal() else part for part in name.split(".")[1:])
        return self.plan.get(short)

    def _column_group(self, name: str) -> Group:
        """The ranks that share a linear's rows: with more ranks than KV heads, some have the same head."""
        group = self.context.tensor_parallel
        if self._kind(name) is None:
            return Group()
        kv_heads = self.heads[1]
        if name.rpartition(".")[2] in ("k_proj", "v_proj") and group.size > kv_heads:
            copies = group.size // kv_heads
            return Group(group.rank // copies, kv_heads)
        return group

