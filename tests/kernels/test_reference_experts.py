"""Mixture of experts: the choice against transformers' routers, the products against NumPy and against `linear`.

Like test_reference.py they run on any back end.
"""

from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tests.kernels import references as ref
from tests.kernels.integers import matrix
from tests.kernels.references import UNIT, dtypes, examples, make_weight, normal, seeds, to_array, to_tensor
from vllm_ms_models.kernels import Integers, Kernels, Routing
from vllm_ms_models.kernels.reference import ReferenceKernels

WEIGHTS = [None, *(Integers(8, 0, kind) for kind in ("dynamic", "static", "float")), Integers(4, 32, "float")]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return ReferenceKernels()


# --- choice ----------------------------------------------------------------------------------------------------

V3 = Routing(6, True, "sigmoid", 2.5, 4, 2, "top2")
ROUTERS: dict[str, tuple[Any, int, Routing]] = {
    "qwen3_moe": (Qwen3MoeTopKRouter, 128, Routing(8, True)),
    "qwen3_moe without renormalisation": (Qwen3MoeTopKRouter, 60, Routing(4)),
    "mixtral": (MixtralTopKRouter, 8, Routing(2, True)),
    "deepseek_v2 greedy": (DeepseekV2TopkRouter, 64, Routing(6, scale=1.5)),
    "deepseek_v2 groups": (DeepseekV2TopkRouter, 160, Routing(6, scale=16.0, groups=8, top_groups=3)),
    "deepseek_v3": (DeepseekV3TopkRouter, 256, Routing(8, True, "sigmoid", 2.5, 8, 4, "top2")),
    "deepseek_v3 small": (DeepseekV3TopkRouter, 16, V3),
    "deepseek_v3 one group": (DeepseekV3TopkRouter, 12, Routing(3, True, "sigmoid", 2.5, 1, 1, "top2")),
    "deepseek_v3 without renormalisation": (DeepseekV3TopkRouter, 32, Routing(3, False, "sigmoid", 0.7, 4, 1, "top2")),
}


def torch_choice(kind: Any, routing: Routing, logits: np.ndarray, bias: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """transformers' router with an identity matrix; the best first."""
    experts = logits.shape[1]
    config = SimpleNamespace(
        num_experts_per_tok=routing.top_k,
        num_experts=experts,
        num_local_experts=experts,
        hidden_size=experts,
        norm_topk_prob=routing.renormalize,
        routed_scaling_factor=routing.scale,
        n_group=routing.groups,
        topk_group=routing.top_groups,
        topk_method="group_limited_greedy" if routing.groups > 1 else "greedy",
    )
    router = kind(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        if bias is not None:
            router.e_score_correction_bias.copy_(torch.from_numpy(bias))
        _, shares, ids = router(torch.from_numpy(logits))
    ranks = torch.from_numpy(logits)
    ranks = (ranks if bias is None else ranks.sigmoid() + torch.from_numpy(bias)).gather(1, ids)
    order = ranks.argsort(-1, descending=True)
    return ids.gather(1, order).numpy(), shares.gather(1, order).numpy()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 200])
def test_choice_is_that_of_transformers(kernels: Kernels, name: str, tokens: int) -> None:
    kind, experts, routing = ROUTERS[name]
    rng = np.random.default_rng(tokens)
    logits = (rng.standard_normal((tokens, experts)) * 2).astype(np.float32)
    bias = rng.standard_normal(experts).astype(np.float32) if routing.scoring == "sigmoid" else None
    ids, shares = kernels.choose_experts(Tensor(logits), routing, None if bias is None else Tensor(bias))
    assert (ids.dtype, shares.dtype) == (ms.int32, ms.float32)
    assert ids.shape == shares.shape == (tokens, routing.top_k)
    if tokens:
        want_ids, want_shares = torch_choice(kind, routing, logits, bias)
        np.testing.assert_array_equal(ids.asnumpy(), want_ids)
        # Exponentials: 64 u and 8 u for each unit of the exponent; both sides have them.
        np.testing.assert_allclose(shares.asnumpy(), want_shares, rtol=2 * (64 + 8 * 20) * UNIT)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_of_equal_experts_and_groups_the_first_are_chosen(kernels: Kernels, scoring: Any) -> None:
    logits = Tensor(np.array([[0, 1, 1, 0, 1, 1, 0, 0]], np.float32))
    one = kernels.choose_experts(logits, Routing(3, scoring=scoring))
    np.testing.assert_array_equal(one[0].asnumpy(), [[1, 2, 4]])
    two = kernels.choose_experts(logits, Routing(2, True, scoring, 2.0, 4, 2))
    np.testing.assert_array_equal(two[0].asnumpy(), [[1, 2]])
    np.testing.assert_array_equal(two[1].asnumpy(), [[1, 1]])


def test_choice_without_numbers(kernels: Kernels) -> None:
    """NaN reaches the shares; ids stay ids."""
    logits = np.zeros((3, 8), np.float32)
    logits[1, 3] = np.nan
    for routing in (Routing(2, True), Routing(2, True, "sigmoid", 1.0, 4, 2, "top2"), Routing(8, True, "sigmoid")):
        ids, shares = (value.asnumpy() for value in kernels.choose_experts(Tensor(logits), routing))
        assert ((ids >= 0) & (ids < 8)).all()
        assert np.isfinite(shares[[0, 2]]).all()
        assert np.isnan(shares[1]).all() == (routing.scoring == "softmax" or routing.top_k == 8)


def test_choices_that_cannot_be_are_refused(kernels: Kernels) -> None:
    logits = Tensor(np.zeros((2, 8), np.float32))
    for routing in (Routing(9), Routing(2, groups=3), Routing(3, groups=4), Routing(1, groups=8, group_rank="top2")):
        with pytest.raises(ValueError, match=r"8 experts .* do not fit a choice of"):
            kernels.choose_experts(logits, routing)
    for options in ({"top_k": 0}, {"groups": 2, "top_groups": 3}, {"scoring": "tanh"}, {"group_rank": "mean"}):
        with pytest.raises(ValueError):
            Routing(**({"top_k": 1} | options))
    with pytest.raises(ValueError):
        kernels.choose_experts(logits, Routing(2), Tensor(np.zeros(7, np.float32)))
    with pytest.raises(ValueError):
        kernels.choose_experts(to_tensor(np.zeros((2, 8)), ms.bfloat16), Routing(2))


# --- products --------------------------------------------------------------------------------------------------


def choices(rng: np.random.Generator, tokens: int, top_k: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Different experts for each token, some of them not among the weights; and shares."""
    ids = np.array([rng.permutation(experts + 2)[:top_k] for _ in range(tokens)], np.int32).reshape(tokens, top_k) - 1
    return ids, rng.standard_normal((tokens, top_k)).astype(np.float32)


@examples
@given(
    seed=seeds,
    tokens=st.sampled_from((0, 1, 2, 7, 40)),
    width=st.sampled_from((1, 13, 64, 130)),
    size=st.sampled_from((1, 20, 48)),
    experts=st.sampled_from((1, 3, 9)),
    gate=st.sampled_from(("silu", "gelu", "gelu_tanh", "clamped_swiglu")),
    first=st.sampled_from((0, 5)),
    shared=st.booleans(),
    biased=st.booleans(),
)
def test_experts_in_float32(
    kernels: Kernels,
    seed: int,
    tokens: int,
    width: int,
    size: int,
    experts: int,
    gate: str,
    first: int,
    shared: bool,
    biased: bool,
) -> None:
    """Every token by itself, in float64."""
    rng = np.random.default_rng(seed)
    x, addend = normal(rng, (tokens, width), ms.float32), normal(rng, (tokens, width), ms.float32) * shared
    gate_up = [normal(rng, (2 * size, width), ms.float32) for _ in range(experts)]
    down = [normal(rng, (width, size), ms.float32) for _ in range(experts)]
    biases = [normal(rng, (experts, outputs), ms.float32) * biased for outputs in (2 * size, width)]
    ids, shares = choices(rng, tokens, min(3, experts), experts)
    want, error = addend.copy(), (ids.shape[1] + 2) * UNIT * np.abs(addend)
    for token, k in np.argwhere((ids >= 0) & (ids < experts)):
        e = ids[token, k]
        gated, gated_error = ref.linear_gated(gate, x[token : token + 1], gate_up[e], biases[0][e])
        product, product_error = ref.linear(gated, down[e], biases[1][e])
        product_error = product_error + (gated_error + UNIT * np.abs(gated)) @ np.abs(down[e]).T * (1 + 1e-3)
        share = float(shares[token, k])
        want[token] += share * product[0]
        error[token] += abs(share) * (product_error[0] + (ids.shape[1] + 3) * UNIT * np.abs(product[0])) * 1.001
    got = kernels.experts(
        to_tensor(x, ms.float32),
        [make_weight(kernels, values, [size, size], ms.float32) for values in gate_up],
        tuple(make_weight(kernels, values, [width], ms.float32) for values in down),
        Tensor(ids + np.int32(first)),
        Tensor(shares),
        gate,
        to_tensor(addend, ms.float32) if shared else None,
        first,
        *(to_tensor(bias, ms.float32) if biased else None for bias in biases),
    )
    ref.assert_close(got, (want, error), ms.float32)


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@examples
@given(
    seed=seeds,
    dtype=dtypes,
    tokens=st.sampled_from((1, 2, 9, 70)),
    width=st.sampled_from((16, 50, 96)),
    size=st.sampled_from((8, 33, 64)),
    shared=st.booleans(),
)
def test_experts_are_their_linears(
    kernels: Kernels, kind: Integers | None, seed: int, dtype: Any, tokens: int, width: int, size: int, shared: bool
) -> None:
    """With every kind of weight: the rows of an expert go through `linear_gated` and `linear`, and are summed once."""
    check_linears(kernels, kind, seed, dtype, tokens, width, size, shared, biased=bool(seed % 3))


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 130])
def test_experts_that_threads_share(kernels: Kernels, kind: Integers | None, tokens: int) -> None:
    """So wide that few rows are multiplied in slices of a matrix; of 130 tokens some experts have too many for that."""
    check_linears(kernels, kind, tokens, ms.bfloat16, tokens, 1040, 328, True, biased=True)


def check_linears(
    kernels: Kernels,
    kind: Integers | None,
    seed: int,
    dtype: Any,
    tokens: int,
    width: int,
    size: int,
    shared: bool,
    biased: bool,
) -> None:
    rng = np.random.default_rng(seed)
    experts = 5
    biases = [
        to_tensor(normal(rng, (experts, n), ms.float32), ms.float32) if biased else None for n in (2 * size, width)
    ]

    def weight(sizes: list[int], inputs: int) -> Any:
        if kind is None:
            return make_weight(kernels, normal(rng, (sum(sizes), inputs), dtype, inputs**-0.5), sizes, dtype)
        return matrix(rng, kind, sizes, inputs, zeros=bool(seed % 2)).load(kernels)

    gate_up, down = zip(*((weight([size, size], width), weight([width], size)) for _ in range(experts)), strict=True)
    x, addend = normal(rng, (tokens, width), dtype), normal(rng, (tokens, width), dtype) * shared
    ids, shares = choices(rng, tokens, 3, experts)
    want, magnitude = addend.copy(), np.abs(addend)
    for e in range(experts):
        rows, k = np.nonzero(ids == e)
        if not len(rows):
            continue
        own = [None if bias is None else bias[e].contiguous() for bias in biases]
        gated = kernels.linear_gated(to_tensor(x[rows], dtype), gate_up[e], "silu", own[0])
        product = kernels.linear(gated, down[e], own[1], ms.float32)
        parts = to_array(product) * shares[rows, k][:, None].astype(np.float64)
        want[rows] += parts
        magnitude[rows] += np.abs(parts)
    got = kernels.experts(
        to_tensor(x, dtype),
        gate_up,
        down,
        Tensor(ids),
        Tensor(shares),
        "silu",
        to_tensor(addend, dtype) if shared else None,
        0,
        *biases,
    )
    ref.assert_close(got, (want, 5 * UNIT * magnitude), dtype)


def test_experts_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    gate_up = [make_weight(kernels, normal(rng, (16, 6), ms.float32), [8, 8], ms.float32)] * 2
    down = [make_weight(kernels, normal(rng, (6, 8), ms.float32), [6], ms.float32)] * 2
    x, ids, shares = (
        to_tensor(np.ones((3, 6)), ms.float32),
        Tensor(np.ones((3, 1), np.int32)),
        to_tensor(np.ones((3, 1)), ms.float32),
    )
    kernels.experts(x, gate_up, down, ids, shares, "silu")
    for arguments in (
        (x, gate_up, down[:1], ids, shares, "silu"),
        (x, down, down, ids, shares, "silu"),
        (x, gate_up, gate_up, ids, shares, "silu"),
        (x, gate_up, down, ids[:2].contiguous(), shares, "silu"),
        (x, gate_up, down, ids, shares[:2].contiguous(), "silu"),
        (x, gate_up, down, ids, shares, "relu"),
        (x, gate_up, down, ids, shares, "silu", x[:2].contiguous()),
        (x, gate_up, down, ids, shares, "silu", None, 0, to_tensor(np.ones((2, 8)), ms.float32)),
        (x, gate_up, down, ids, shares, "silu", None, 0, None, to_tensor(np.ones((1, 6)), ms.float32)),
    ):
        with pytest.raises(ValueError):
            kernels.experts(*arguments)
