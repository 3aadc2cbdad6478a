"""What encoders of images share: patches, their embedding, and rows in another order."""

from collections.abc import Iterator
from math import prod

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.layers.layer import Layer


def patches(pixels: Tensor, size: int) -> Tensor:
    """Images `[images, channels, height, width]` -> their patches `[images * patches, channels * size * size]`.

    Patches go row by row; what is left at the right and below is dropped, as a convolution with that stride does.
    """
    images, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    if (rows * size, columns * size) != (height, width):
        pixels = pixels[:, :, : rows * size, : columns * size]
    split = pixels.reshape(images, channels, rows, size, columns, size)
    return mint.permute(split, (0, 2, 4, 1, 3, 5)).reshape(images * rows * columns, -1).contiguous()


def take_rows(x: Tensor, numbers: np.ndarray) -> Tensor:
    """Rows of `x` `[rows, ...]` by their numbers, int64 `[n]`."""
    return kernels.get().take_rows(x, numbers)


class PatchEmbedding(Layer):
    """Patches `[patches, values]` -> `[patches, hidden]`: a convolution whose stride is the size of its kernel.

    `kernel` is the shape of one output's weights in the checkpoint, (channels, [frames,] height, width). Whole on every
    rank, and never quantized.
    """

    def __init__(self, name: str, hidden_size: int, kernel: tuple[int, ...], dtype: ms.Type, bias: bool) -> None:
        super().__init__()
        self.name = name
        self.shape = (hidden_size, *kernel)
        self.kernels = kernels.get()
        self.weight = self.kernels.new_weight([hidden_size], prod(kernel), dtype)
        self.bias = Tensor.from_numpy(np.zeros(hidden_size, np.float32)) if bias else None

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            self.kernels.load_rows(self.weight, 0, 0, source.reshape(len(source), -1))

        yield Slot(f"{self.name}.weight", self.shape, load)
        if self.bias is not None:
            target = self.bias.asnumpy()  # shares memory with the tensor

            def load_bias(source: np.ndarray) -> None:
                target[...] = source

            yield Slot(f"{self.name}.bias", self.shape[:1], load_bias)

    def construct(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)


class Parameter(Layer):
    """A tensor of the checkpoint that is added to activations, whole on every rank: `value`, of the model's dtype."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: ms.Type) -> None:
        super().__init__()
        self.name = name
        self.dtype = dtype
        self.loaded = np.zeros(shape, np.float32)
        self.value: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            self.loaded[...] = source

        yield Slot(self.name, self.loaded.shape, load)

    def finish_loading(self) -> None:
        self.value = kernels.get().place(Tensor.from_numpy(self.loaded)).astype(self.dtype)
