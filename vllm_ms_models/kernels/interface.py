"""The kernels a model needs, as one small interface over MindSpore tensors.

Three back ends implement it: `reference` (plain MindSpore operators; the definition), `cpu` (C++) and `ascend`
(fused operators). Conventions, valid for every method:

* `tokens` is the number of tokens in the step, over all sequences; it may be 0.
* activations are contiguous `[tokens, features]`, in float32, bfloat16 or float16; accumulation is in float32;
  the result has the dtype of the activation unless a method says otherwise.
* results are fresh tensors that belong to the caller, except where a method says "in place".
* shapes are the caller's duty: layers check them once at load, kernels check cheaply and raise ValueError.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.kernels.low_rank import Addend, LowRank
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.routing import Routing
from vllm_ms_models.kernels.sampling import Sampling
from vllm_ms_models.kernels.weight import Integers, Weight

SCALE_BYTES = 4  # of the float32 scale beside each row of a cache of int8


class Kernels(ABC):
    """One back end. Obtain the active one with `vllm_ms_models.kernels.get()`."""

    name: ClassVar[str]
    own_memory: ClassVar[bool] = False  # whether they compute on a device whose memory is not the host's
    compiled: ClassVar[bool] = False  # whether layers become graphs of them; then `mla_prefill` is for all steps
    sampling: Sampling | None = None  # what chooses tokens there, so that no logits come to the host

    @abstractmethod
    def describe(self) -> str:
        """One phrase for the start-up line, e.g. `C++ (AVX-512 BF16, 2 threads)`."""

    @property
    def beside_graphs(self) -> "Kernels":
        """These, for layers that run operator by operator where others are compiled."""
        return self

    # --- memory ------------------------------------------------------------------------------------------------

    def place(self, x: Tensor) -> Tensor:
        """`x`, of the host's memory, where the other methods take it: a copy if that is another memory.

        `PagedSequences` and `LowRank.rows` stay in the host's.
        """
        return x

    def fetch(self, x: Tensor) -> Tensor:
        """The opposite of `place`."""
        return x

    def take_rows(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """Rows of `x` `[rows, ...]` by their numbers, int64 `[n]`, which all exist."""
        if x.dtype != ms.bfloat16:
            return Tensor.from_numpy(x.asnumpy()[rows])
        return Tensor.from_numpy(x.view(ms.int16).asnumpy()[rows]).view(ms.bfloat16)  # NumPy has no bfloat16

    def new_cache(self, shape: tuple[int, ...], dtype: ms.Type) -> Any:
        """Where there is own memory: the cache of a layer, zeros, for the methods that take one (see `cache_shape`)."""
        return ms.mint.zeros(shape, dtype=dtype)

    def memory(self) -> tuple[int, int]:
        """Bytes of a device's own memory: all, and what is left."""
        raise NotImplementedError(f"{self.name} kernels have no memory of their own")

    # --- weights -----------------------------------------------------------------------------------------------

    @abstractmethod
    def new_weight(self, sizes: Sequence[int], in_features: int, dtype: ms.Type) -> Weight:
        """Allocate a zeroed matrix `[sum(sizes), in_features]`."""

    @abstractmethod
    def load_rows(self, weight: Weight, part: int, first_row: int, source: np.ndarray) -> None:
        """Copy `source` `[rows, in_features]` to rows `first_row...` of part `part`, converting its dtype.

        `source` may be float32, float16 or ml_dtypes.bfloat16, and a strided (even memory-mapped) view with unit
        stride in its last axis; it is read once, front to back. Rounding is to nearest, ties to even.
        """

    @abstractmethod
    def new_integer_weight(self, sizes: Sequence[int], in_features: int, integers: Integers) -> Weight:
        """Allocate a matrix of integers, `dtype` int8, for `linear`, `linear_split` and `linear_gated`.

        Its scales are 0 until they are loaded, and so are products with it; inputs have scale 1 and offset 0.
        """

    @abstractmethod
    def load_integers(self, weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
        """Copy int8 `values` `[rows, in_features]`, in range for the weight's bits, to rows `first_row...` of `part`.

        Views are as good as for `load_rows`.
        """

    @abstractmethod
    def load_float8(
        self, weight: Weight, part: int, first_row: int, values: np.ndarray, scales: np.ndarray, width: int, offset: int
    ) -> None:
        """As `load_rows`, of e4m3 `values[i, j] * scales[i, (offset + j) // width]`, in float32; ValueError for NaN.

        A weight of int8 rows gets them over their largest magnitudes, times 127, rounded; and scales that undo it.
        """

    @abstractmethod
    def load_scales(
        self,
        weight: Weight,
        part: int,
        first_row: int,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        addends: np.ndarray | None = None,
    ) -> None:
        """Set scales, zero points and addends of rows `first_row...` of `part`.

        `scales` is float32 `[rows, groups]`, `zeros` int8 `[rows, groups]` (default: 0), `addends` int32 `[rows]`
        (default: 0), for int8 activations only.
        """

    @abstractmethod
    def set_input(self, weight: Weight, part: int, scale: float, offset: int) -> None:
        """Set how "static" activations of `part` are rounded: scale > 0, -128 <= offset <= 127.

        Parts that share an input are quicker to multiply, since it is rounded once.
        """

    def settle(self, weight: Weight, dtype: ms.Type) -> None:  # noqa: B027 (most have nothing to do)
        """`weight` is loaded: what its products with activations of `dtype` need is made now, not by the first one."""

    def settle_experts(  # noqa: B027
        self, gate_up: Sequence[Weight], down: Sequence[Weight], biased: tuple[bool, bool], dtype: ms.Type
    ) -> None:
        """The same of weights for `experts`; `biased` says whether there are biases for either."""

    # --- dense -------------------------------------------------------------------------------------------------

    @abstractmethod
    def linear(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        dtype: ms.Type | None = None,
        addend: Addend | None = None,
    ) -> Tensor:
        """`x @ weight.T + bias`: `[tokens, in_features]` -> `[tokens, out_features]`, parts side by side.

        `bias` is float32 `[out_features]`. `dtype` is the result's (default: that of `x`; float32 for logits).
        `addend` is what adapters add to each row before it is rounded (`reduce`).
        """

    @abstractmethod
    def linear_split(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Addend | None = None
    ) -> tuple[Tensor, ...]:
        """As `linear`, each part in a contiguous tensor of its own `[tokens, sizes[i]]`."""

    @abstractmethod
    def linear_gated(
        self, x: Tensor, weight: Weight, activation: str, bias: Tensor | None = None, addend: Addend | None = None
    ) -> Tensor:
        """`activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`, rounded once.

        `weight` has two parts of one size, gate and up; the result is `[tokens, sizes[0]]`. `activation` is `silu`,
        `gelu` (with erf), `gelu_tanh`, or gpt-oss's `clamped_swiglu`: `g * sigmoid(1.702 g) * (u + 1)`, where g is the
        gate, at most 7, and u `up`, from -7 to 7. `addend` is added to gate and up before they meet.
        """

    @abstractmethod
    def reduce(self, x: Tensor, rows: Tensor, adapters: Sequence[LowRank | None]) -> Addend:
        """The first half of each token's adapter: `scales[i] * (x @ down_i.T)`, not rounded (`LowRank`, `Addend`).

        `x` is what the linear multiplies, `[tokens, in_features]`; `rows` int32 `[tokens]` says which of `adapters` a
        token has, -1 for none. All of them are for the same linear. ValueError for a number beyond the last.
        """

    @abstractmethod
    def linear_heads(self, x: Tensor, weights: Sequence[Weight], passed: int = 0) -> Tensor:
        """Each head's features times a matrix of its own: `x_h @ weights[h].T`.

        `[tokens, heads * (in + passed)]` -> `[tokens, heads * (out + passed)]`, `weights` being matrices of floats
        `[out, in]`, one part each; the last `passed` features of every head are copied.
        """

    @abstractmethod
    def embedding(self, ids: Tensor, weight: Weight, first_row: int = 0) -> Tensor:
        """Rows `ids - first_row` of `weight`, as `[tokens, in_features]` in the weight's dtype.

        `ids` is int32 or int64 `[tokens]`. An id outside `first_row <= id < first_row + out_features` gives zeros
        (another rank owns it).
        """

    # --- mixture of experts ------------------------------------------------------------------------------------

    @abstractmethod
    def choose_experts(self, logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each token's experts: ids int32 and shares float32, `[tokens, top_k]` each; `Routing` says how.

        `logits` is float32 `[tokens, experts]`, `bias` float32 `[experts]`. The best comes first. A row with NaN gives
        NaN shares to some experts.
        """

    @abstractmethod
    def experts(
        self,
        x: Tensor,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        ids: Tensor,
        shares: Tensor,
        activation: str,
        addend: Tensor | None = None,
        first_expert: int = 0,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        """`sum_k shares[t, k] * down[e](linear_gated(x[t], gate_up[e])) + addend[t]`, e = `ids[t, k] - first_expert`.

        `x`, `addend` (what shared experts give) and the result are `[tokens, features]`. Gated products are rounded to
        the dtype of `x`, as `linear_gated` does; the rest is float32, summed in ascending order of experts, and rounded
        once. `gate_up` and `down` have a weight each for every expert of this rank; those of experts that no token has
        chosen are not read. `ids` and `shares` are from `choose_experts`; an e that is not among the weights adds
        nothing (another rank owns it). Biases are float32, a row for each of the weights: `[experts, gate | up]` and
        `[experts, features]`; they are added to the products.
        """

    # --- elementwise -------------------------------------------------------------------------------------------

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, computed in float32 and rounded once.

        `x` is `[..., features]`, `weight` float32 `[features]`; or `[size]`, where features are heads of that size:
        then each head is normalised by itself.
        """

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`residual += x`, rounded to its dtype, then `rms_norm` of that: (normed, residual), maybe in place."""

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last axis, in float32, rounded once.

        `x` is `[..., features]`, `weight` and `bias` float32 `[features]`; the variance is the mean of squares.
        """

    @abstractmethod
    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As `add_rms_norm`, with `layer_norm`."""

    @abstractmethod
    def activate(self, x: Tensor, activation: str) -> Tensor:
        """Of each value: `silu`, `gelu` (with erf), `gelu_tanh`, `quick_gelu` (`x * sigmoid(1.702 x)`), `relu`."""

    @abstractmethod
    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """`gate / (1 + exp(-gate)) * up`, `[tokens, features]` each."""

    @abstractmethod
    def gelu_and_mul(self, gate: Tensor, up: Tensor, approximate: bool) -> Tensor:
        """`gelu(gate) * up`: with erf, or the tanh approximation when `approximate`."""

    # --- attention ---------------------------------------------------------------------------------------------

    @abstractmethod
    def rotary(
        self,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        head_size: int,
        interleaved: bool,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Rotate `query` `[tokens, heads * head_size]` and `key` `[tokens, heads * (head_size - offset)]`.

        The results may be the arguments, rotated in place: these are not to be used again.

        `positions` is int64 `[tokens]`; `cos_sin` float32 `[max_position, rotary_size]`, row p holding
        cos(p f_0) ... cos(p f_{r/2-1}), sin(p f_0) ... sin(p f_{r/2-1}). Of each head, `rotary_size` features
        rotate, the others stay: a query's from `offset` on, a key's from the first. Pairs are (i, i + rotary_size/2),
        or (2i, 2i + 1) when `interleaved`, counted from there.
        """

    @abstractmethod
    def cache_shape(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, storage: ms.Type | None = None
    ) -> tuple[int, int, int, int, int]:
        """Shape of one layer's KV cache, block axis first, for `write_kv` and `paged_attention`.

        `storage` is the cache's dtype: int8, or that of the keys (None). What a block holds where is the back end's
        own; its bytes are those of its keys and values, and of a float32 scale for each of int8. Raises ValueError for
        a block size that the back end does not take; every one takes multiples of 16.
        """

    @abstractmethod
    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Store `key` and `value` `[tokens, kv_heads * head_size]` at `slots` of `cache`, in place.

        `slots` is int64 `[tokens]`: block * block_size + offset; a negative slot is skipped. `cache` has the dtype
        of `key`, or int8, and the shape given by `cache_shape`.

        To a cache of int8, each token's key and value of each head is rounded as "dynamic" activations are
        (`Integers`), by its own scale, which is kept beside it: m = max|x|, q = rint(x * (127 / m)), scale = m / 127.
        If one of its values is not finite, q is 0 and the scale NaN.
        """

    @abstractmethod
    def paged_attention(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        causal: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of `query` `[tokens, heads * head_size]` over the paged cache, any mix of prefill and decode.

        Query head h reads KV head `h // (heads / kv_heads)`. The token at position p attends to positions j <= p
        (all of the sequence's when not `causal`), and, with a `window`, j > p - window. Scores are
        `scale * q.k`, then `soft_cap * tanh(score / soft_cap)` if given, softmax in float32. Rows that belong to no
        sequence (beyond `query_start[-1]`) are undefined. `sinks`, float32 `[heads]`, are scores of one more position
        that all see and that has no value: `exp(sink)` joins the sum that probabilities are divided by.

        In a cache of int8, a key or value is its integers times its scale: `q.k` is the product with the integers
        times the key's scale, and a value's scale multiplies the value's probability, unless that is 0. Hence what a
        token does not attend to cannot make it NaN.
        """

    # --- multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) ---------------------------------------------

    @abstractmethod
    def latent_cache_shape(self, num_blocks: int, block_size: int, width: int) -> tuple[int, int, int]:
        """Shape of one layer's cache, block axis first, for `write_latent` and `mla_attention`.

        A position takes `width` values in the dtype of the activations and nothing else. Raises ValueError for a block
        size that the back end does not take; every one takes multiples of 16.
        """

    @abstractmethod
    def write_latent(self, latent: Tensor, key: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Store the rows of `latent` and `key` `[tokens, ...]`, side by side, at `slots` of `cache`, in place.

        Together they have `width` values; slots as in `write_kv`.
        """

    @abstractmethod
    def mla_attention(
        self, query: Tensor, cache: Tensor, sequences: PagedSequences, scale: float, value_size: int
    ) -> Tensor:
        """Causal attention of `query` `[tokens, heads * width]` over keys that all heads share.

        A position's key is its `width` values in the cache, its value the first `value_size` of them. The result is
        `[tokens, heads * value_size]`: softmax in float32 of `scale * q.k` over the positions up to the token's own.
        Rows that belong to no sequence (beyond `query_start[-1]`) are undefined.
        """

    @abstractmethod
    def mla_prefill(
        self,
        query: Tensor,
        cache: Tensor,
        sequences: PagedSequences,
        keys: Sequence[Weight],
        values: Sequence[Weight],
        scale: float,
    ) -> Tensor:
        """Causal attention of `query` `[tokens, heads * key_size]` over keys and values that latents are expanded to.

        Head h's key of a position is `linear(latent, keys[h])` and, behind it, what follows the latent in the cache;
        its value is `linear(latent, values[h])`. Both are rounded to the activations' dtype, and a value has at most as
        many features as a key. The result is `[tokens, heads * values]`, as that of `mla_attention`; each head of a
        sequence is expanded once, so this pays for many tokens of it.
        """
