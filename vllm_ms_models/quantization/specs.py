"""How the weight of one linear lies in a checkpoint: what a format's description comes down to for one module.

Plain data, without MindSpore: configurations are checked in processes that run no model. `quantization/schemes.py` has
the scheme of each. Parts of a fused linear must have equal specs.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Spec:
    """Base of all; equal specs are stored and multiplied alike."""


@dataclass(frozen=True)
class FloatWeight(Spec):
    """`weight` in a float dtype."""


@dataclass(frozen=True)
class Int8Weight(Spec):
    """int8 `weight` [out, in], and a scale of each row, of groups of a row, or of the whole (`per_tensor`).

    `scale` and `zero` are the names of the tensors of scales and of zero points (None: they are 0). A weight element is
    `(weight - zero) * scale`. Static activations have `input_scale`, and `input_zero_point` if `input_offset`.
    """

    activations: Literal["dynamic", "static", "float"]
    scale: str = "weight_scale"
    zero: str | None = None
    group_size: int = 0
    per_tensor: bool = False
    input_offset: bool = False


@dataclass(frozen=True)
class Int8Product(Spec):
    """int8 `weight` [out, in] with static activations, described by its product.

    `(round(x / input_scale) + input_offset) . weight + quant_bias`, times `deq_scale` [out]. `quant_bias` int32 [out]
    holds the correction for the offset and the layer's own bias. With `input_channels`, input scale and offset are
    given for each of the inputs.
    """

    input_channels: bool = False


@dataclass(frozen=True)
class PackedWeight(Spec):
    """Integers in int32 words along the input, first in the lowest bits, plus `2 ** (bits - 1)` (compressed-tensors).

    `weight_packed` [out, in / n], `weight_scale` [out, groups], `weight_shape` [2]; with `zeros`, `weight_zero_point`
    [out / n, groups] packed along the output; with `ordered`, `weight_g_idx` [in], the group of each input.
    """

    bits: int
    group_size: int
    zeros: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class GptqWeight(Spec):
    """`qweight` [in / n, out] packed along the input, `qzeros` [groups, out / n], `scales` [groups, out], `g_idx` [in].

    Values and zero points are unsigned. Words of zero points are less by one in each field unless `version` is 2.
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    version: int


@dataclass(frozen=True)
class AwqWeight(Spec):
    """`qweight` [in, out / 8] and `qzeros` [groups, out / 8] packed along the output, `scales` [groups, out].

    Unsigned values of 4 bits; a word holds, from its lowest bits, columns 0, 2, 4, 6, 1, 3, 5, 7.
    """

    group_size: int


@dataclass(frozen=True)
class Fp8Weight(Spec):
    """`weight` float8_e4m3fn [out, in] and `scale`, the tensor of its scales.

    One scale for each `block` of rows and columns, for each row (`per_channel`), or one in all. With `requantized` the
    model multiplies int8, otherwise its own dtype.
    """

    scale: str = "weight_scale"
    block: tuple[int, int] | None = None
    per_channel: bool = False
    requantized: bool = False
