"""Latent attention, absorbed and expanded, against the definition, in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.references import share_error
from tests.layer_testing import (
    back_end,  # noqa: F401 (autouse)
    context,
    load,
    normal,
)
from vllm_ms_models.bridge.tensors import DTYPES, to_mindspore, to_torch
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.layers import mla
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.mla import LatentHeads, MultiHeadLatentAttention
from vllm_ms_models.layers.rotary import RotaryEmbedding

HIDDEN, HEADS, RANK, NOPE, ROPE, VALUE = 40, 3, 19, 11, 6, 13
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest value, see below


def make(q_lora_rank: int | None, bias: bool, mscale: float = 0.0, interleaved: bool = True) -> SimpleNamespace:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 100.0}
    return SimpleNamespace(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        attention_bias=bias,
        max_position_embeddings=128,
        rope_parameters=scaling | {"mscale": mscale, "mscale_all_dim": mscale},
        interleaved=interleaved,
    )


def checkpoint(config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {
        "kv_a_proj_with_mqa.weight": (RANK + ROPE, HIDDEN),
        "kv_a_layernorm.weight": (RANK,),
        "kv_b_proj.weight": (HEADS * (NOPE + VALUE), RANK),
        "o_proj.weight": (HIDDEN, HEADS * VALUE),
    }
    if config.q_lora_rank is None:
        shapes["q_proj.weight"] = (HEADS * (NOPE + ROPE), HIDDEN)
    else:
        shapes["q_a_proj.weight"] = (config.q_lora_rank, HIDDEN)
        shapes["q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["q_b_proj.weight"] = (HEADS * (NOPE + ROPE), config.q_lora_rank)
    if config.attention_bias:
        biased = ["kv_a_proj_with_mqa", "o_proj"] + (["q_a_proj"] if config.q_lora_rank else [])
        shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}
    return {
        f"a.{name}": normal(seed, *shape, dtype=dtype) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: torch.Tensor, config: Any, rotary: RotaryEmbedding) -> torch.Tensor:
    """`[tokens, heads, ROPE]` by complex numbers (pairs), or with halves exchanged."""
    cos, sin = to_torch(rotary.cos_sin)[: len(x), None].double().chunk(2, -1)
    first, second = (x[..., 0::2], x[..., 1::2]) if config.interleaved else x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def expected(hidden: torch.Tensor, tensors: dict[str, torch.Tensor], config: Any, rotary: Any) -> torch.Tensor:
    """Section 2.1 of arXiv:2405.04434, nothing absorbed."""
    w = {name.removeprefix("a."): tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x, tokens = hidden.double(), len(hidden)
    if config.q_lora_rank is None:
        query = linear("q_proj", x)
    else:
        query = linear("q_b_proj", norm(linear("q_a_proj", x), w["q_a_layernorm.weight"]))
    query = query.reshape(tokens, HEADS, NOPE + ROPE)
    latent, key = linear("kv_a_proj_with_mqa", x).split((RANK, ROPE), -1)
    both = linear("kv_b_proj", norm(latent, w["kv_a_layernorm.weight"])).reshape(tokens, HEADS, NOPE + VALUE)
    keys = torch.cat((both[..., :NOPE], rotated(key[:, None], config, rotary).expand(-1, HEADS, -1)), -1)
    query = torch.cat((query[..., :NOPE], rotated(query[..., NOPE:], config, rotary)), -1)
    mscale = 0.1 * config.rope_parameters["mscale_all_dim"] * np.log(4.0) + 1
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (NOPE + ROPE) ** -0.5 * mscale**2
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    result = torch.einsum("hqk,khd->qhd", scores.softmax(-1), both[..., NOPE:])
    return linear("o_proj", result.reshape(tokens, -1))


@pytest.mark.parametrize("expand_from", [1, 6, 1000])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("q_lora_rank", "bias", "mscale", "interleaved"),
    [(None, False, 0.0, True), (23, True, 1.0, True), (23, False, 0.707, False)],
)
def test_in_one_piece_and_in_steps(
    dtype: torch.dtype,
    q_lora_rank: int | None,
    bias: bool,
    mscale: float,
    interleaved: bool,
    expand_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill, then a chunk, then a token, over scattered blocks. Rounded are: queries and their absorbed form (or
    keys and values), latents, probabilities (some kernels), the mean and the result; five units of bfloat16 in all."""
    monkeypatch.setattr(mla, "EXPAND_FROM", expand_from)
    config, tokens = make(q_lora_rank, bias, mscale, interleaved), 21
    rotary = RotaryEmbedding(config, context(dtype), interleaved, before=NOPE)
    cell: Any = MultiHeadLatentAttention(config, rotary, context(dtype), "a")
    tensors = checkpoint(config, dtype)
    for part in (part for _, part in cell.cells_and_names() if hasattr(part, "slots")):
        own = {slot.name for slot in part.slots()}
        load(part, {name: tensors[name] for name in own})
        if hasattr(part, "finish_loading"):
            part.finish_loading()
    hidden = normal(99, tokens, HIDDEN, dtype=dtype)
    shape = cell.attention.kernels.latent_cache_shape(4, 16, RANK + ROPE)
    cell.attention.cache = to_mindspore(torch.full(shape, float("nan"), dtype=dtype))
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    got = []
    for first, last in ((0, 14), (14, 20), (20, 21)):
        positions = torch.arange(first, last)
        slots = table[0, positions // 16].long() * 16 + positions % 16
        starts, lengths = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        start, length, blocks = map(to_mindspore, (starts, lengths, table))
        sequences = PagedSequences(start, length, blocks, last - first, last)
        batch = Batch(to_mindspore(positions), {"a.attn": CacheView(sequences, to_mindspore(slots))})
        got.append(to_torch(cell(to_mindspore(hidden[first:last].contiguous()), batch)))
    want = expected(hidden, tensors, config, rotary)
    off = (torch.cat(got).double() - want).abs().max() / want.abs().max()
    assert off < TOLERANCE[dtype] + share_error(cell.attention.kernels, DTYPES[dtype])


def test_the_matrix_is_kept_once() -> None:
    """kv_b_proj itself is gone after loading."""
    cell = LatentHeads("b", HEADS, RANK, NOPE, VALUE, context())
    load(cell, {"b.weight": normal(0, HEADS * (NOPE + VALUE), RANK)})
    cell.finish_loading()
    assert cell.scheme is None
    assert [weight.sizes for weight in cell.absorbing] == [(RANK,)] * HEADS
    assert [weight.sizes for weight in cell.keys] == [(NOPE,)] * HEADS
    assert [weight.sizes for weight in cell.values] == [(VALUE,)] * HEADS


def test_a_batch_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a sequence that decodes and of two prompts give what each gives alone, all absorbed."""
    config, dtype = make(None, False), torch.float32
    rotary = RotaryEmbedding(config, context(dtype), True, before=NOPE)
    cell: Any = MultiHeadLatentAttention(config, rotary, context(dtype), "a")
    tensors = checkpoint(config, dtype)
    for part in (part for _, part in cell.cells_and_names() if hasattr(part, "slots")):
        load(part, {name: tensors[name] for name in {slot.name for slot in part.slots()}})
        if hasattr(part, "finish_loading"):
            part.finish_loading()
    counts, lengths = [1, 2, 9, 3], [18, 2, 11, 3]
    shape = cell.attention.kernels.latent_cache_shape(8, 16, RANK + ROPE)
    filled = normal(1, *shape, dtype=dtype)
    table = torch.arange(8, dtype=torch.int32).reshape(4, 2)
    hidden = normal(2, sum(counts), HIDDEN, dtype=dtype).split(counts)

    def run(which: list[int]) -> torch.Tensor:
        cell.attention.cache = to_mindspore(filled.clone())
        spans = [torch.arange(lengths[i] - counts[i], lengths[i]) for i in which]
        slots = torch.cat([table[i, span // 16].long() * 16 + span % 16 for i, span in zip(which, spans, strict=True)])
        starts = torch.tensor([0, *torch.tensor([counts[i] for i in which]).cumsum(0)]).int()
        ends = torch.tensor([lengths[i] for i in which]).int()
        start, length, blocks = map(to_mindspore, (starts, ends, table[which]))
        sequences = PagedSequences(start, length, blocks, max(counts[i] for i in which), 18)
        batch = Batch(to_mindspore(torch.cat(spans)), {"a.attn": CacheView(sequences, to_mindspore(slots))})
        return to_torch(cell(to_mindspore(torch.cat([hidden[i] for i in which])), batch))

    monkeypatch.setattr(mla, "EXPAND_FROM", 1000)
    alone = torch.cat([run([i]) for i in range(4)])
    monkeypatch.setattr(mla, "EXPAND_FROM", 9)
    # Of values of order 1, sums of up to 40 products, rounded in another order.
    torch.testing.assert_close(run([0, 1, 2, 3]), alone, rtol=0, atol=40 * 2**-24)
