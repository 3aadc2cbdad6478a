"""What a back end with a device of its own memory offers besides `Kernels`, so that no logits need come to the host."""

from typing import Protocol

from mindspore import Tensor


class Sampling(Protocol):
    """Choice of tokens by a device, of float32 logits `[rows, vocab]` there."""

    def rows(self, x: Tensor, numbers: Tensor) -> Tensor:
        """`x[numbers]` of `[rows, features]`, on the device; `numbers` is int32, in the host's memory."""

    def argmax(self, logits: Tensor) -> Tensor:
        """int64 `[rows]`, in the host's memory; the first of equal values."""

    def candidates(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Token ids int64 and logits float32, `[rows, n]` each, of what top-k, then top-p, leave of each row.

        Both are in the host's memory. The best come first, and what is left out within n has -inf. Logits are divided
        by `temperature` first. `temperature` and `top_p` are float32 `[rows]`, `top_k` int32 `[rows]`, in the host's
        memory. As many as are equal to the last of k are kept; the smallest set whose probabilities reach p is, softmax
        being over the k.
        """
