"""What a compiled graph is told of a step's sequences, for the layers of one cache group. **Not run on hardware.**

A graph is compiled for one of three kinds of steps, whose inputs are, besides the slots of the rows:

* "decode": every sequence has one row, which is its last and sees all: tables, lengths
* "fresh": no sequence has context, all that rows see are rows: lengths
* "mixed": all others, and all where a window hides something: tables, lengths, lengths of queries, where rows and all
  positions are (`prepared.Pages`)
"""

from collections.abc import Sequence

import mindspore as ms
from mindspore import Tensor

from vllm_ms_models.kernels.ascend.prepared import Prepared, mask


def describe(step: Prepared, block_size: int, window: int | None, takes_flash: bool) -> tuple[str, tuple[Tensor, ...]]:
    """The kind of a step for layers with that window, and its inputs; `takes_flash`: "fresh" is possible."""
    if takes_flash and step.limit(window) is None and not step.decoding:
        return "fresh", (step.query_lens,)
    pages = step.pages(window, block_size, halves=False)
    if pages.places is None or pages.columns is None:
        return "decode", (pages.tables, pages.lengths)
    return "mixed", (pages.tables, pages.lengths, step.query_lens, pages.places, pages.columns)


def taken(
    kind: str, slots: Tensor, inputs: Sequence[Tensor], window: int | None, causal: bool, dtype: ms.Type
) -> dict[str, Tensor]:
    """Within the graph: its inputs by name, and the mask. Which names there are tells the kind."""
    if kind == "fresh":
        return {"slots": slots, "lengths": inputs[0]}
    if kind == "decode":
        return {"slots": slots, "tables": inputs[0], "lengths": inputs[1]}
    hides = mask(inputs[3], inputs[4], window, causal, dtype)
    return {"slots": slots, "tables": inputs[0], "lengths": inputs[1], "query_lens": inputs[2], "mask": hides}


def hidden(pages: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Mask and lengths of queries, for PagedAttention."""
    if "mask" in pages:
        return pages["mask"], pages["query_lens"]
    return None, None
