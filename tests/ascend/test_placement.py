"""What goes to a device of its own memory in a step, and what comes back: counted in whole engine runs.

Nothing here runs on the hardware: the stand-in's memory is the host's, but all that goes there or comes back is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from tests.ascend.contract import Contract
from tests.ascend.standin import StandIn
from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine
from vllm_ms_models import kernels
from vllm_ms_models.bridge.on_device import OnDevice, RowsOnDevice
from vllm_ms_models.kernels.ascend import AscendKernels
from vllm_ms_models.kernels.ascend.sampling import DeviceSampling

VOCABULARY = 211
HIDDEN = 64


@contextmanager
def on_standin(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[tuple[LLM, StandIn]]:
    """An engine on a stand-in, in bfloat16, whose lists of transfers are empty at first."""
    folder = checkpoint("llama", dtype=torch.bfloat16, head_dim=32, num_key_value_heads=2, hidden_size=HIDDEN)
    standin = StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    with engine(folder, dtype="bfloat16", async_scheduling=False, **options) as llm:
        standin.uploads.clear()
        yield llm, standin


def generate(llm: LLM, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    options = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "detokenize": False} | sampling
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**options), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_what_a_greedy_step_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In: ids, positions, slots, rows to sample, and what attention is told of the sequences. Out: the tokens."""
    with on_standin(monkeypatch) as (llm, standin):
        generate(llm, random_prompts([5, 9]))  # parameters go to the device at first use
        standin.uploads.clear()
        standin.downloads.clear()
        generate(llm, random_prompts([6, 9]), max_tokens=2)
        uploads, downloads = standin.uploads, standin.downloads
    assert downloads == [((2,), "Int64"), ((2,), "Int64")]  # a prefill and a decoding step
    tokens = [shape[0] for shape, _ in uploads if len(shape) == 1]
    assert max(tokens) == 15
    assert not any(HIDDEN in shape or VOCABULARY in shape for shape, _ in uploads)
    # ids, positions, slots, rows, how many tokens rotate, lengths of queries and sequences, two tables: not for layers
    assert len(uploads) / 2 <= 9, uploads


@pytest.mark.parametrize(
    ("sampling", "shapes"),
    [
        pytest.param({"temperature": 0.8, "top_k": 5, "seed": 3}, "candidates", marks=pytest.mark.slow),
        pytest.param({"temperature": 0.8, "top_p": 0.5, "seed": 3}, "candidates", marks=pytest.mark.slow),
        ({"temperature": 0.8, "top_p": 0.9, "top_k": 8, "seed": 3}, "candidates"),
        ({"temperature": 0.8, "seed": 3}, "logits"),
        pytest.param({"temperature": 0.8, "top_k": 5, "min_p": 0.1, "seed": 3}, "logits", marks=pytest.mark.slow),
        ({"logprobs": 2}, "logits"),
        pytest.param({"presence_penalty": 0.5}, "logits", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_logits_come_to_the_host_only_where_they_must(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], shapes: str
) -> None:
    """And tokens are those that vLLM's sampler chooses of the same logits."""
    prompts = random_prompts([5, 9, 17])
    with on_standin(monkeypatch) as (llm, standin):
        standin.downloads.clear()
        tokens = generate(llm, prompts, **sampling)
        widths = {shape[1] for shape, _ in standin.downloads if len(shape) == 2}
        assert (VOCABULARY in widths) == (shapes == "logits"), widths
        standin.downloads.clear()
        monkeypatch.setattr("vllm_ms_models.bridge.device_sampler.is_plain", lambda metadata: False)
        assert generate(llm, prompts, **sampling) == tokens
        assert all(shape[1] == VOCABULARY for shape, _ in standin.downloads)


def test_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM computes with these logits itself: it gets them."""
    with on_standin(monkeypatch) as (llm, _):
        (prompt,) = random_prompts([9])
        sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, detokenize=False, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        assert len(output.prompt_logprobs) == 9


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    standin = StandIn()
    monkeypatch.setattr(kernels, "_active", AscendKernels(standin))
    return standin


def test_torch_reads_what_is_on_the_device(standin: StandIn) -> None:
    values = torch.randn(6, 4)
    rows = RowsOnDevice(Tensor(values.numpy()))
    assert rows.shape == values.shape and len(rows) == 6 and not standin.downloads
    some = rows[torch.tensor([5, 0])][1:]
    assert isinstance(some, RowsOnDevice) and not standin.downloads
    assert torch.equal(torch.add(some, 1), values[:1] + 1)
    assert torch.equal(torch.cat([rows, values]), torch.cat([values, values]))
    assert len(standin.downloads) == 2  # one for each that was read
    logits = OnDevice(Tensor(values.numpy()))
    assert torch.equal(logits[torch.tensor([2])], values[2:3])
    torch.nn.functional.relu_(logits.host)
    assert torch.equal(logits.softmax(-1), values.relu().softmax(-1))
    target = torch.zeros(6, 4)
    target[:] = rows
    assert torch.equal(target, values)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("k", [None, 1, 7, 300])
@pytest.mark.parametrize("p", [None, 0.0, 0.3, 0.95, 1.0])
def test_candidates_are_those_that_vllm_keeps(standin: StandIn, rows: int, k: int | None, p: float | None) -> None:
    """Ties at the k-th place included; at p's edge it is vLLM's sort that decides between equal ones."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(rows, 300)) * 4).astype(np.float32)
    logits = logits.round(1) if p is None else logits
    temperature = rng.uniform(0.5, 1.5, rows).astype(np.float32)
    top_k = None if k is None else np.full(rows, k, np.int32)
    top_p = None if p is None else np.full(rows, p, np.float32)
    given = (None if each is None else Tensor(each) for each in (top_k, top_p))
    ids, values = DeviceSampling(standin).candidates(Tensor(logits), Tensor(temperature), *given)
    left = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(left, ids.asnumpy(), values.asnumpy(), 1)
    kept = (None if each is None else torch.from_numpy(each) for each in (top_k, top_p))
    want = apply_top_k_top_p(torch.from_numpy(logits / temperature[:, None]), *kept)
    assert np.array_equal(np.isfinite(left), torch.isfinite(want).numpy())
    assert np.array_equal(left, want.numpy())
    assert ids.dtype == ms.int64 and (np.diff(values.asnumpy()[:, :1]) <= 0).all()


@pytest.mark.parametrize("rows", [1, 5])
def test_calls_of_the_choice_are_well_formed(rows: int) -> None:
    """MindSpore takes them; those that a CPU lacks the kernel of give zeros (tests/ascend/contract.py)."""
    contract = Contract()
    sampling = DeviceSampling(contract)
    logits, ones = ms.mint.zeros((rows, 300)), ms.mint.ones(rows)
    assert sampling.argmax(logits).shape == (rows,)
    assert sampling.rows(logits, Tensor(np.zeros(3, np.int32))).shape == (3, 300)
    ids, values = sampling.candidates(logits, ones, Tensor(np.full(rows, 7, np.int32)), ones * 0.5)
    assert ids.shape == values.shape
    assert {call[0] for call in contract.seen} == {"argmax", "gather", "sort", "softmax", "cumsum"}
