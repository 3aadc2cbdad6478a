"""How adapters come and go: more than fit, pinned, replaced; and what they must not change: other requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import counter, engine, token_ids
from tests.lora import adapters as lora_adapters
from tests.lora.adapters import Request, adapter, ask, check, lora, requests, three, torch_models

if TYPE_CHECKING:
    from vllm import LLM

SERVED: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "disable_log_stats": False}


@pytest.fixture(scope="module")
def paths() -> list[Path]:
    return [*three("qwen2"), adapter("qwen2", 4, r=2)]


@pytest.fixture(scope="module")
def models(paths: list[Path]) -> list[torch.nn.Module]:
    return torch_models(checkpoint("qwen2"), paths)


@pytest.fixture(scope="module")
def llm() -> "Iterator[LLM]":
    with engine(checkpoint("qwen2"), **SERVED, max_cpu_loras=2) as llm:
        yield llm


def kept(llm: "LLM") -> set[int]:
    found: set[int] = llm.llm_engine.list_loras()
    return found


def test_more_adapters_than_are_kept(llm: "LLM", paths: list[Path], models: list[torch.nn.Module]) -> None:
    """Four, of which a step may have two and two are kept: dropped ones are read again. Then each alone, twice."""
    wanted = requests(models, [6] * 10)
    check(ask(llm, wanted, paths), wanted)
    assert len(kept(llm)) == 2
    for request in wanted[1:5] * 2:
        check(ask(llm, [request], paths), [request])
        assert request.adapter in kept(llm)


def test_prefixes_are_cached_for_each_adapter(llm: "LLM", paths: list[Path], models: list[torch.nn.Module]) -> None:
    """The same long prompt for one adapter, another and none; then once more, from the cache."""
    (prompt,) = random_prompts([100], seed=3)
    wanted = [
        Request(prompt, which, lora_adapters.torch_reference.greedy(models[which], prompt, 8)) for which in (1, 3, 0)
    ]
    assert len({tuple(request.answer.tokens) for request in wanted}) == 3
    answers = [request.answer.tokens for request in wanted]
    before = counter(llm, "vllm:prefix_cache_hits")
    for _ in range(2):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * 3,
            sampling(),
            use_tqdm=False,
            lora_request=[lora(paths[0], 1), lora(paths[2], 3), None],
        )
        assert token_ids(outputs) == answers
    assert counter(llm, "vllm:prefix_cache_hits") > before


def test_pinned_and_removed(llm: "LLM", paths: list[Path], models: list[torch.nn.Module]) -> None:
    engine = llm.llm_engine
    for number in kept(llm):
        assert engine.remove_lora(number)
    assert kept(llm) == set()
    assert not engine.remove_lora(1)
    with pytest.raises(Exception, match="Adapter number 1 is not loaded, so it cannot be pinned; load it first"):
        engine.pin_lora(1)
    assert engine.add_lora(lora(paths[0], 1)) and engine.pin_lora(1)
    wanted = requests(models, [5] * 5)
    check(ask(llm, [wanted[2], wanted[3], wanted[4]], paths), [wanted[2], wanted[3], wanted[4]])
    assert 1 in kept(llm)
    assert engine.pin_lora(next(iter(kept(llm) - {1})))
    with pytest.raises(
        Exception, match="All 2 adapters that --max-cpu-loras allows are pinned; raise it, or unload one"
    ):
        engine.add_lora(lora(paths[0], 9))
    for number in kept(llm):
        engine.remove_lora(number)


def test_replaced_in_place(llm: "LLM", paths: list[Path], models: list[torch.nn.Module]) -> None:
    first, second = requests(models, [5] * 3, least=lora_adapters.LEAST_MARGIN)[1:]
    check(ask(llm, [first], paths), [first])
    llm.llm_engine.add_lora(lora(paths[1], 1, load_inplace=True))
    replaced = Request(second.prompt, 1, second.answer)
    check(ask(llm, [replaced], [paths[1]]), [replaced])
    llm.llm_engine.remove_lora(1)


def sampling() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


def test_answers_do_not_depend_on_the_batch(paths: list[Path]) -> None:
    """In bfloat16, where a rounding more or less would show: to the bit, the log-probabilities of requests alone, of
    all together, and, of those without an adapter, of an engine without adapters."""
    prompts = random_prompts([5, 11, 3, 8, 1, 6])
    wanted = [Request(prompt, number % 4, None) for number, prompt in enumerate(prompts)]  # type: ignore[arg-type]
    options: dict[str, Any] = {"dtype": "bfloat16", "max_lora_rank": 8, "max_loras": 3, "enable_lora": True}

    def logprobs(outputs: Any) -> list[np.ndarray]:
        return [lora_adapters.distributions(output.outputs[0].logprobs, 211) for output in outputs]

    with engine(checkpoint("qwen2"), **options) as llm:
        together = logprobs(ask(llm, wanted, paths))
        alone = [logprobs(ask(llm, [request], paths))[0] for request in wanted]
    with engine(checkpoint("qwen2"), dtype="bfloat16") as llm:
        plain = logprobs(ask(llm, [wanted[0], wanted[4]], paths))
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(plain, [together[0], together[4]], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Adapters whose values both dtypes hold, in a model of float32: nothing else is rounded."""
    source, name = adapter("qwen2", 5), "adapter_model.safetensors"
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file({key: tensor.to(dtype) for key, tensor in load_file(source / name).items()}, folder / name)
    models = torch_models(checkpoint("qwen2"), [folder])
    wanted = requests(models, [5, 20])
    with engine(checkpoint("qwen2"), enable_lora=True, lora_dtype=str(dtype).removeprefix("torch.")) as llm:
        check(ask(llm, wanted, [folder]), wanted)
