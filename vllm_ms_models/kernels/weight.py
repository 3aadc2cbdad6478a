"""Matrices as the kernels keep them."""

from dataclasses import dataclass
from typing import Literal

import mindspore as ms
from mindspore import Tensor


@dataclass(frozen=True)
class Integers:
    """How a weight of small integers is stored and multiplied.

    `bits` is 8 or 4, two's complement: -128 to 127, or -8 to 7. `group_size` neighbouring inputs of a row share a scale
    and a zero point; 0 stands for the whole row. `activations` are

    * "dynamic": rounded to int8 by a scale of each token. A row x has m = max|x|, q = rint(x * (127 / m)) and the scale
      t = m / 127 (q is 0 where 127 / m is no float32 number: m is 0 or below 4e-37). Then
      `y_n = float32(sum_k q_k (w_nk - z_n) + addend_n) * (t * s_n) + bias_n`.
    * "static": rounded to int8 by a scale and an offset from the checkpoint (`Kernels.set_input`):
      q = clip(rint(x * (1 / scale)) + offset, -128, 127), and
      `y_n = float32(sum_k q_k (w_nk - z_n) + addend_n) * s_n + bias_n`. Here s_n is the scale of the product: who loads
      it has multiplied those of input and weight, and put `-offset * sum_k w_nk` into the addend.
    * "float": left as they are, `y_n = sum_g s_ng * (sum_{k in g} x_k (w_nk - z_ng)) + bias_n`.

    Everything is float32 arithmetic in which rint is to nearest, ties to even; sums of integers are exact (int32), sums
    of floats in any order. A row rounded to int8 in which a value is not finite gives NaN.

    With int8 activations the weight has 8 bits and no groups; groups are multiples of 16, the last may be shorter.
    Raises ValueError for anything else.
    """

    bits: int
    group_size: int
    activations: Literal["dynamic", "static", "float"]

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"Weights of {self.bits} bits are not supported; 4 and 8 are.")
        if self.activations not in ("dynamic", "static", "float"):
            raise ValueError(f"Activations cannot be {self.activations!r}; dynamic, static and float are supported.")
        if self.activations != "float" and (self.bits, self.group_size) != (8, 0):
            raise ValueError(
                f"int8 activations need weights of 8 bits without groups, not {self.bits} bits in groups of "
                f"{self.group_size}."
            )
        if self.group_size < 0 or self.group_size % 16:
            raise ValueError(f"Groups of {self.group_size} inputs are not supported; multiples of 16 are, and 0.")

    def groups(self, in_features: int) -> int:
        """Scales of a row of `in_features` inputs."""
        return -(-in_features // self.group_size) if self.group_size else 1


@dataclass(frozen=True)
class Weight:
    """A matrix in the layout its back end multiplies fastest; opaque outside that back end.

    `sizes` are the output features of each part of a fused matrix (q, k and v; gate and up), one entry if not fused.
    `data` holds the values; its layout and padding are the back end's own. `integers` is None for a matrix of floats.
    """

    data: Tensor
    sizes: tuple[int, ...]
    in_features: int
    dtype: ms.Type
    integers: Integers | None = None

    @property
    def out_features(self) -> int:
        return sum(self.sizes)
