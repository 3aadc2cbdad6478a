"""Linears and embeddings of mindone's models while these are constructed: only their sizes are noted.

Nothing is allocated and nothing filled with random numbers; `parts.py` puts our layers in their places.
"""

from typing import Any

from mindspore import nn


class NotedLinear(nn.Cell):
    """`nn.Dense` and `mint.nn.Linear`, which call their arguments differently."""

    def __init__(
        self,
        in_channels: int = 0,
        out_channels: int = 0,
        third: Any = None,
        *options: Any,
        has_bias: bool = True,
        bias: bool = True,
        in_features: int = 0,
        out_features: int = 0,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(third, bool):  # mint's; that of `nn` is how to initialise the weight
            bias = third
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
