"""Our linears, embeddings and experts in the places of those that mindone's models noted (noted.py).

They bring what mindone's have not: bfloat16 and speed on CPUs, and a share of each matrix for each rank.
"""

from collections.abc import Mapping
from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.distributed.group import Group
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import Linear, RowParallelLinear, column_part
from vllm_ms_models.suites.mindone.experts import experts_for
from vllm_ms_models.suites.mindone.noted import NotedEmbedding, NotedLinear

HEAD = "lm_head"
KEYS_AND_VALUES = ("k_proj", "v_proj")


class ColumnLinear(Linear):
    """`[tokens, in_features]` -> the outputs of the rank of `group`, which need not be all ranks'."""

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
        result = self.inner((x if x.is_contiguous() else x.contiguous()).view(-1, size))
        return result.view(*before, result.shape[-1])


class Tokens(Layer):
    """An embedding of ours for ids with any number of axes."""

    def __init__(self, inner: VocabParallelEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def construct(self, ids: Tensor) -> Tensor:
        rows = self.inner(ids.view(-1))
        return rows.view(*ids.shape, rows.shape[-1])


class Maker:
    """Makes our layers for a model whose config is `config`; its plan says how ranks share the linears.

    The plan is transformers' own (`base_model_tp_plan`): patterns of names, with a star for a layer's number and no
    `model.` before. What it does not name, or in another way than by rows or columns, every rank has whole.
    """

    def __init__(self, config: Any, context: ModelContext, plan: Mapping[str, str]) -> None:
        self.config = config
        self.context = context
        self.plan = plan
        self.embedding: VocabParallelEmbedding | None = None

    def replace(self, cell: nn.Cell, prefix: str = "") -> None:
        """Put ours in the place of each noted layer in `cell`."""
        for name, part in list(cell.name_cells().items()):
            full = f"{prefix}{name}"
            if isinstance(part, NotedLinear):
                _put(cell, name, self.linear(full, part))
            elif isinstance(part, NotedEmbedding):
                _put(cell, name, self.embed(full, part))
            elif (experts := experts_for(full, part, self.config, self.context)) is not None:
                _put(cell, name, experts)
            else:
                self.replace(part, f"{full}.")

    def embed(self, name: str, noted: NotedEmbedding) -> Tokens:
        self.embedding = VocabParallelEmbedding(name, noted.num_embeddings, noted.embedding_dim, self.context)
        return Tokens(self.embedding)

    def linear(self, name: str, noted: NotedLinear) -> Rows:
        sizes = noted.in_features, noted.out_features
        if name == HEAD and not noted.has_bias:
            tied_to = self.embedding if self.config.tie_word_embeddings else None
            return Rows(ParallelLMHead(name, sizes[1], sizes[0], self.context, tied_to))
        kind = self.plan.get(".".join("*" if part.isdecimal() else part for part in name.split(".")[1:]))
        if kind == "rowwise":
            return Rows(RowParallelLinear(name, *sizes, self.context, noted.has_bias))
        group = self.context.tensor_parallel if kind == "colwise" else Group()
        if kind == "colwise" and name.rpartition(".")[2] in KEYS_AND_VALUES:
            group = kv_group(self.config, group)
        return Rows(ColumnLinear(name, *sizes, self.context, noted.has_bias, group))


def kv_group(config: Any, group: Group) -> Group:
    """The ranks that share the KV heads: with more ranks than these, neighbours have the same one.

    ValueError if the heads cannot be shared so.
    """
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    copies = max(1, group.size // kv_heads)
    if group.size % copies or kv_heads % (group.size // copies):
        raise ValueError(
            f"The number of KV heads ({kv_heads}) cannot be shared by {group.size} tensor-parallel ranks; choose a "
            "--tensor-parallel-size that divides it, or that it divides."
        )
    return Group(group.rank // copies, group.size // copies)


def _put(cell: Any, name: str, part: nn.Cell) -> None:
    if isinstance(cell, nn.CellList | nn.SequentialCell):
        cell[int(name)] = part
    else:
        setattr(cell, name, part)
