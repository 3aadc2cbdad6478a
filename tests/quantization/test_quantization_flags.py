"""What vLLM makes of a quantized checkpoint before it builds a model: no flag is needed, a wrong one is an error."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoint
from tests.engines import engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import written
from tests.quantization.writers import Scheme

FORMATS: dict[str, tuple[Scheme, list[str], list[str]]] = {
    # scheme, names that agree, names that do not
    "compressed-tensors": (writers_compressed.SCHEMES["w8a8 dynamic"], ["compressed-tensors"], ["fp8", "awq"]),
    "fp8": (writers_others.FP8["fp8 in blocks"], ["fp8"], ["gptq", "compressed-tensors"]),
    "awq": (writers_others.WORDS["awq"], ["awq", "auto_awq", "awq_marlin"], ["gptq", "humming", "moe_wna16"]),
    "gptq": (writers_others.WORDS["gptq"], ["gptq", "auto_gptq", "gptq_marlin"], ["awq", "moe_wna16"]),
    "modelslim": (writers_others.DESCRIBED["modelslim w8a8"], ["ascend"], ["fp8", "awq", "golden-stick"]),
    "golden stick": (writers_others.DESCRIBED["golden stick w8a8"], ["golden-stick"], ["ascend"]),
}


def configure(folder: Path, **options: Any) -> Any:
    """vLLM's configuration of a server for `folder`."""
    from vllm import EngineArgs

    return EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=64, **options).create_engine_config()


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Path, list[str], list[str]]]:
    scheme, agreeing, others = FORMATS[request.param]
    yield written("llama", scheme).folder, agreeing, others


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_no_flag_is_needed(case: tuple[Path, list[str], list[str]], dtype: str) -> None:
    """In every dtype, whatever vLLM's own class for the method supports."""
    configure(case[0], dtype=dtype)


def test_a_flag_that_agrees(case: tuple[Path, list[str], list[str]]) -> None:
    folder, agreeing, _ = case
    for name in agreeing:
        configure(folder, quantization=name)


def test_a_flag_that_does_not(case: tuple[Path, list[str], list[str]]) -> None:
    folder, _, others = case
    for name in others:
        with pytest.raises(
            ValueError, match=rf"does not match|--quantization {name} does not belong|config file for {name}"
        ):
            configure(folder, quantization=name)


@pytest.mark.parametrize("name", ["fp8", "awq", "gptq", "compressed-tensors", "int8_per_channel_weight_only"])
def test_a_flag_for_a_model_in_floats(name: str) -> None:
    """vLLM would quantize while it loads; here that is refused, never ignored."""
    with pytest.raises(ValueError, match=f"--quantization {name} is not possible: the checkpoint is not quantized"):
        configure(checkpoint("llama"), quantization=name)


@pytest.mark.parametrize("name", ["ascend", "golden-stick"])
def test_a_flag_without_the_description_file(name: str) -> None:
    """The sentence is vLLM's own."""
    with pytest.raises(ValueError, match=f"Cannot find the config file for {name}"):
        configure(checkpoint("llama"), quantization=name)


@pytest.mark.parametrize("kind", ["fp8", "fp8_per_token_head", "int4_per_token_head", "nvfp4", "turboquant_k8v4"])
def test_a_quantized_cache(kind: str) -> None:
    with pytest.raises(
        ValueError, match=f"{kind} is not supported: .*; use --kv-cache-dtype auto or int8_per_token_head"
    ):
        configure(checkpoint("llama"), kv_cache_dtype=kind)


def test_a_cache_of_int8() -> None:
    """What was asked for is what the rest of vLLM reads."""
    config = configure(checkpoint("llama"), kv_cache_dtype="int8_per_token_head")
    assert config.cache_config.cache_dtype == "int8_per_token_head"


@pytest.mark.parametrize("options", [{"fp8": "int4"}, {"fp9": "int8"}])
def test_options_that_are_not_known(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"--additional-config .* is not understood"):
        configure(checkpoint("llama"), additional_config=options)


def test_two_descriptions(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(written("llama", writers_others.WORDS["awq"]).folder, folder)
    (folder / "quant_model_description.json").write_text("{}")
    with pytest.raises(ValueError, match=r"both quantization_config in config\.json and quant_model_description\.json"):
        configure(folder)


def test_an_unknown_method(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    scheme = Scheme(writers_compressed.int8(), {"quant_method": "bitsandbytes", "load_in_8bit": True})
    shutil.copytree(written("llama", scheme).folder, folder)
    with pytest.raises(ValueError, match="bitsandbytes"):
        configure(folder)


@pytest.mark.parametrize("name", ["compressed-tensors", "fp8", "awq", "gptq", "modelslim", "golden stick"])
def test_dummy_weights(name: str) -> None:
    with engine(
        written("qwen2", FORMATS[name][0]).folder,
        load_format="dummy",
        max_model_len=64,
    ) as llm:
        assert len(set(token_ids(greedy(llm, [[1, 2, 3]], 8))[0])) > 1
