"""From the last hidden states to logits."""

from mindspore import Tensor

from vllm_ms_models.layers.embedding import ParallelLMHead
from vllm_ms_models.layers.layer import Layer


class LogitsProcessor(Layer):
    """Logits of the rows that are sampled: `scale * head(hidden)`, then `soft_cap * tanh(logits / soft_cap)`.

    `hidden` is `[rows, hidden]`, only the rows wanted; the result float32 `[rows, vocab]`.
    """

    def __init__(self, scale: float = 1.0, soft_cap: float | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.soft_cap = soft_cap

    def construct(self, head: ParallelLMHead, hidden: Tensor) -> Tensor:
        logits = head(hidden)
        if 0 in logits.shape:
            return logits
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            # tanh as 2 sigmoid(2x) - 1: MindSpore's operator is off by 1e-4 on CPU beyond 5, this form by 2e-6.
            logits = (2.0 / (1.0 + (logits * (-2.0 / self.soft_cap)).exp()) - 1.0) * self.soft_cap
        return logits
