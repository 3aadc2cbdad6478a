"""What the fused operators mean, by their documentation, in NumPy on a CPU: float32 inside, rounded once at the end.

An object with the functions of `operators`, of which each call is also held against the contract. It shows that
`AscendKernels` makes the right calls of operators that do what is documented; not that the hardware's do.
"""

from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor

from tests.ascend.arrays import array_of, sigmoid, tensor, wide
from tests.ascend.checks import described
from tests.ascend.contract import DOCUMENTED, copied, write_rows
from tests.ascend.standin_experts import ExpertsMeaning
from vllm_ms_models.kernels.reference_memory import memory


class Meaning(ExpertsMeaning):
    """The documented meaning of each operator, over arrays."""

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return tensor(wide(x) @ wide(weight).T, x.dtype)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return Tensor.from_numpy(array_of(table)[rows.asnumpy()])

    def batch_matmul(self, x: Tensor, y: Tensor, transposed: bool) -> Tensor:
        return tensor(wide(x) @ (wide(y).swapaxes(1, 2) if transposed else wide(y)), x.dtype)

    def index_put(self, target: Tensor, rows: Tensor, values: Tensor) -> None:
        writable(target)[rows.asnumpy()] = writable(values)

    def tanh(self, x: Tensor) -> Tensor:
        return tensor(np.tanh(wide(x)), x.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        gate, up = np.split(wide(x), 2, -1)
        return tensor(gate * sigmoid(gate) * up, x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        return tensor(wide(x) * sigmoid(wide(x)), x.dtype)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        return tensor(torch.nn.functional.gelu(torch.from_numpy(wide(x)), approximate=approximate).numpy(), x.dtype)

    def relu(self, x: Tensor) -> Tensor:
        return tensor(np.maximum(wide(x), 0), x.dtype)

    def sigmoid(self, x: Tensor) -> Tensor:
        return tensor(sigmoid(wide(x)), x.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        values = wide(x)
        return tensor(values / np.sqrt(np.mean(values**2, -1, keepdims=True) + eps) * wide(gamma), x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = tensor(wide(x) + wide(residual), x.dtype)
        return self.rms_norm(total, gamma, eps), total

    def layer_norm(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        off = wide(x) - wide(x).mean(-1, keepdims=True)
        scaled = off / np.sqrt(np.mean(off**2, -1, keepdims=True) + eps)
        return tensor(scaled * wide(gamma) + wide(beta), x.dtype)

    def apply_rotary_pos_emb(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        turned = []
        for x in (query, key):
            heads = wide(x).reshape(len(x), -1, cos.shape[1])
            first, second = np.split(heads, 2, -1)
            halves = np.concatenate((-second, first), -1)
            turned.append(tensor((heads * wide(cos)[:, None] + halves * wide(sin)[:, None]).reshape(x.shape), x.dtype))
        return turned[0], turned[1]

    def reshape_and_cache(
        self, key: Tensor, value: Tensor | None, key_cache: Tensor, value_cache: Tensor | None, slots: Tensor
    ) -> None:
        numbers = slots.asnumpy()
        for x, cache in ((key, key_cache), (value, value_cache)):
            if x is not None and cache is not None:
                rows = memory(cache).reshape(-1, x.shape[1])
                rows[numbers[numbers >= 0]] = memory(x)[numbers >= 0]

    def paged_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lengths: Tensor,
        mask: Tensor | None,
        query_lens: Tensor | None,
        heads: int,
        kv_heads: int,
        scale: float,
        mla_v_dim: int,
    ) -> Tensor:
        counts = np.ones(len(lengths), int) if query_lens is None else query_lens.asnumpy()
        block, size = keys.shape[1], keys.shape[3]
        rows, first = [], 0
        for table, length, count in zip(tables.asnumpy(), lengths.asnumpy(), counts, strict=True):
            used = table[: -(-int(length) // block)]
            k, v = (wide_part(cache, used).reshape(-1, kv_heads, size)[:length] for cache in (keys, values))
            added = 0.0 if mask is None else wide(mask)[first : first + count, :length]
            q = wide(query)[first : first + count].reshape(count, heads, size)
            rows.append(attend(q, k, v[..., : mla_v_dim or size], added, scale))
            first += int(count)
        return tensor(np.concatenate(rows), query.dtype)

    def flash_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_lens: Tensor,
        key_lens: Tensor,
        heads: int,
        scale: float,
    ) -> Tensor:
        if mask is not None:
            want = 1.0 if query.dtype == ms.bfloat16 else -10000.0
            assert np.array_equal(wide(mask), np.triu(np.full((128, 128), want), 1)), "the mask is the triangle"
        size = query.shape[1] // heads
        rows, first = [], 0
        for count, length in zip(query_lens.asnumpy(), key_lens.asnumpy(), strict=True):
            assert count == length, "a sequence has context"
            q, k, v = (wide(x)[first : first + count].reshape(count, -1, size) for x in (query, key, value))
            added = 0.0 if mask is None else np.triu(np.full((count, count), -np.inf), 1)
            rows.append(attend(q, k, v, added, scale))
            first += int(count)
        return tensor(np.concatenate(rows), query.dtype)

    def argmax(self, x: Tensor) -> Tensor:
        return tensor(wide(x).argmax(-1), ms.int64)

    def sort(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = np.argsort(-wide(x), -1, kind="stable")
        return tensor(np.take_along_axis(wide(x), places, -1), x.dtype), tensor(places, ms.int64)

    def softmax(self, x: Tensor) -> Tensor:
        shares = np.exp(wide(x) - wide(x).max(-1, keepdims=True))
        return tensor(shares / shares.sum(-1, keepdims=True), x.dtype)

    def cumsum(self, x: Tensor) -> Tensor:
        return tensor(np.cumsum(wide(x), -1), x.dtype)

    def quantize(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return tensor(np.clip(np.rint(wide(x) * wide(scale) + wide(offset)), -128, 127), ms.int8)

    def quantize_by_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = np.abs(wide(x)).max(-1) / np.float32(127)
        return tensor(np.rint(wide(x) / scales[:, None]), ms.int8), tensor(scales, ms.float32)

    def quant_matmul(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, token_scales: Tensor | None, dtype: Any
    ) -> Tensor:
        sums = array_of(x).astype(np.int64) @ array_of(weight).astype(np.int64).T
        sums = sums if bias is None else sums + bias.asnumpy()
        undo = scale.asnumpy()
        undo = undo.astype(np.uint32).view(np.float32) if undo.dtype == np.int64 else undo
        undo = undo if token_scales is None else undo * token_scales.asnumpy()[:, None]
        return tensor(sums.astype(np.float32) * undo, dtype)


def writable(x: Tensor) -> np.ndarray:
    return memory(x, or_int8=True)


def wide_part(cache: Tensor, blocks: np.ndarray) -> np.ndarray:
    return memory(cache)[blocks].astype(np.float32)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, added: Any, scale: float) -> np.ndarray:
    """`[rows, heads, size]` over `[positions, kv_heads, size]`; `added` `[rows, positions]` to scores."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(scale) + added
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", shares, v).reshape(len(q), -1)


class StandIn:
    """`Meaning`, with every call and result held against the documented shapes; `called` are the operators' names."""

    def __init__(self) -> None:
        self.meaning = Meaning()
        self.called: list[str] = []
        self.uploads: list[Any] = []  # shapes and dtypes of what went to the device, and came back
        self.downloads: list[Any] = []

    def to_device(self, x: Tensor) -> Tensor:
        self.uploads.append(described(x))
        return copied(x)

    def to_host(self, x: Tensor) -> Tensor:
        self.downloads.append(described(x))
        return copied(x)

    @staticmethod
    def memory() -> tuple[int, int]:
        return 2 << 30, 1 << 30

    @staticmethod
    def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
        write_rows(target, first, rows)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            shapes = DOCUMENTED[name](*arguments)
            self.called.append(name)
            results = getattr(self.meaning, name)(*arguments)
            found = () if results is None else results if isinstance(results, tuple) else (results,)
            assert [(tuple(x.shape), x.dtype) for x in found] == shapes, f"{name}: {[described(x) for x in found]}"
            return results

        return call
