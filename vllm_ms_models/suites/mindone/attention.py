"""The function that mindone's models call for attention: ours, over the paged cache of vLLM."""

from dataclasses import dataclass
from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch

NAME = "vllm_ms"
"""What it is called in mindone's ALL_ATTENTION_FUNCTIONS. (In mindone, names with `paged` mean something else.)"""

# Given by some models to every such function, and without meaning for ours: there is no mask, and no cache of theirs.
MEANINGLESS = {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal"}


@dataclass
class Step:
    """The batch of the step that is running, and how many of its layers have attended to it."""

    batch: Batch | None = None
    attended: int = 0


class PagedAttention(nn.Cell):
    """What becomes part of each of mindone's attention modules: our attention, and where it finds the batch."""

    def __init__(self, attention: Attention, step: Step) -> None:
        super().__init__()
        self.attention = attention
        self.step = step

    def construct(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of one sequence of all tokens, `[1, heads, tokens, head_size]` each -> `[1, tokens, heads, head_size]`."""
        attention, batch = self.attention, self.step.batch
        assert batch is not None
        self.step.attended += 1
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        found = [tuple(tensor.shape[1::2]) for tensor in (query, key, value)]
        if found != [(heads, size), (kv_heads, size), (kv_heads, size)]:
            raise ValueError(
                f"The attention {attention.name} of this model has {found} heads and their sizes in queries, keys and "
                f"values, where the cache is made for {heads} and {kv_heads} of {size}; it cannot be served from "
                "mindone."
            )
        rows = (tensor.swapaxes(1, 2).contiguous().view(-1, tensor.shape[1] * size) for tensor in (query, key, value))
        return attention(*rows, batch).view(1, -1, heads, size)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, in mindone's convention; `module` is the layer's, with a `PagedAttention` in it.

    ValueError if it is asked for what our attention does not do, such as a mask.
    """
    wrong = [name for name, value in others.items() if name not in MEANINGLESS and value is not None]
    if attention_mask is not None:
        wrong.append("attention_mask")
    if wrong:
        raise ValueError(
            f"{type(module).__name__} of mindone calls attention with {', '.join(wrong)}, which is not supported; "
            "it cannot be served from mindone."
        )
    paged: PagedAttention = module.paged_attention
    attention = paged.attention
    if sliding_window not in (None, attention.window):
        raise ValueError(
            f"{type(module).__name__} of mindone has a window of {sliding_window} where the config has one of "
            f"{attention.window}; it cannot be served from mindone."
        )
    attention.soft_cap = softcap
    if scaling is not None:
        attention.scale = float(scaling)
    return paged(query, key, value), None
