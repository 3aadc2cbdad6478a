"""Damaged quantized checkpoints: each ends in one error sentence before anything is served, never in anything else."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.checkpoint.checkpoint_files import save
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import written
from tests.quantization.test_quantized_linears import quantization
from tests.quantization.writers import Scheme
from vllm_ms_models import kernels, registry
from vllm_ms_models.checkpoint import CheckpointError, list_tensors, load
from vllm_ms_models.checkpoint.header import DTYPES
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.context import ModelContext

SCHEMES: dict[str, Scheme] = {
    **{f"compressed-tensors {name}": scheme for name, scheme in writers_compressed.SCHEMES.items()},
    **writers_others.SCHEMES,
}
MODULE = "model.layers.1.self_attn.k_proj"
OTHER = "model.layers.0.mlp.down_proj"

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    before = kernels._active
    kernels.use(ReferenceKernels())
    yield
    kernels._active = before


def read(folder: Path) -> Tensors:
    arrays = {}
    for name, info in list_tensors(folder).items():
        data = info.path.read_bytes()[info.offset : info.offset + info.nbytes]
        arrays[name] = np.frombuffer(data, DTYPES[info.dtype]).reshape(info.shape).copy()
    return arrays


def copy_with(name: str, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The model of a scheme with other tensors, in one file."""
    source = written("qwen2", SCHEMES[name]).folder
    tensors = read(source)
    change(tensors)
    save(folder / "model.safetensors", tensors)
    for file in source.glob("*.json"):
        if not file.name.endswith("index.json"):
            shutil.copy(file, folder / file.name)
    return folder


def load_model(name: str, folder: Path) -> Any:
    model = written("qwen2", SCHEMES[name])
    config = AutoConfig.from_pretrained(model.folder)
    described = type(model)(folder, model.model, model.linears)
    context = ModelContext(ms.float32, 64, quantization=quantization(described, name))
    cell = registry.lookup("Qwen2ForCausalLM")(config, context)
    cells = [part for _, part in cell.cells_and_names() if hasattr(part, "slots")]
    load(folder, [slot for part in cells for slot in part.slots()], progress=False)
    for part in cells:
        if hasattr(part, "finish_loading"):
            part.finish_loading()
    return cell


def refused(name: str, folder: Path, *texts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(name, folder)
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    assert "\n" not in message and len(message) < 3000


@pytest.mark.parametrize("name", SCHEMES)
def test_sound(name: str, tmp_path: Path) -> None:
    """The copy that all others are damaged copies of."""
    load_model(name, copy_with(name, tmp_path, lambda tensors: None))


def ends(name: str) -> list[str]:
    tensors = list_tensors(written("qwen2", SCHEMES[name]).folder)
    return [tensor.removeprefix(f"{MODULE}.") for tensor in tensors if tensor.startswith(f"{MODULE}.")]


def redundant(name: str, end: str) -> bool:
    product = ("modelslim w8a8" in name and "dynamic" not in name) or name == "golden stick w8a8"
    return (
        end == "beta"
        or (end == "bias" and product)
        or (end == "input_scale" and "fp8" in name)
        or (end == "g_idx" and "order" not in name)
        or (end == "g_idx" and "by channel" in name)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    for number, end in enumerate(ends(name)):
        folder = tmp_path / str(number)
        copy_with(name, folder, lambda tensors, end=end: tensors.pop(f"{MODULE}.{end}"))  # type: ignore[misc]
        if redundant(name, end):
            load_model(name, folder)
        else:
            refused(name, folder, f"{MODULE}.{end}", "missing")


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_of_another_shape(name: str, tmp_path: Path) -> None:
    for number, end in enumerate(ends(name)):
        folder = tmp_path / str(number)

        def change(tensors: Tensors, end: str = end) -> None:
            tensor = tensors[f"{MODULE}.{end}"]
            tensors[f"{MODULE}.{end}"] = np.concatenate([tensor, tensor])

        refused(name, copy_with(name, folder, change), f"{MODULE}.{end}", "shape")


@pytest.mark.parametrize("name", SCHEMES)
def test_tensors_of_another_dtype(name: str, tmp_path: Path) -> None:
    for number, end in enumerate(ends(name)):
        folder = tmp_path / str(number)

        def change(tensors: Tensors, end: str = end) -> None:
            tensors[f"{MODULE}.{end}"] = tensors[f"{MODULE}.{end}"].astype(np.float64)

        refused(name, copy_with(name, folder, change), f"{MODULE}.{end}", "F64")


@pytest.mark.parametrize("end", ["k_scale", "weight_extra", "output_scale", "kv_cache_scale", "weight_g_idx"])
@pytest.mark.parametrize("name", ["compressed-tensors w8a8 dynamic", "awq", "modelslim w8a8"])
def test_extra_tensors(name: str, end: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{end}"] = np.ones(1, np.float32)

    refused(name, copy_with(name, tmp_path, change), f"{MODULE}.{end}", "not known")


def set_values(end: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{end}"].flat[0] = value

    return change


VALUES: list[tuple[str, str, Any, str]] = [
    ("compressed-tensors w8a8 dynamic", "weight_scale", np.nan, "not finite"),
    ("compressed-tensors w8a8 dynamic", "weight_scale", np.inf, "not finite"),
    ("compressed-tensors w8a8 static", "input_scale", 0, "above 0"),
    ("compressed-tensors w8a8 static", "input_scale", -1, "above 0"),
    ("compressed-tensors packed w4a16", "weight_shape", 81, "weight_shape"),
    ("compressed-tensors packed w4a16, activation order", "weight_g_idx", 99, "inputs in each group"),
    ("compressed-tensors packed w4a16, activation order", "weight_g_idx", -1, "inputs in each group"),
    ("gptq", "g_idx", 3, "not in the order of their groups"),
    ("gptq", "qzeros", 0x77777778, "not in the middle"),
    ("gptq, activation order", "g_idx", 99, "inputs in each group"),
    ("awq", "scales", np.nan, "not finite"),
    ("fp8 in blocks", "weight", np.nan, "not numbers"),
    ("fp8 in blocks", "weight_scale_inv", np.inf, "not finite"),
    ("modelslim w8a8", "input_offset", 0.5, "whole numbers"),
    ("modelslim w8a8", "input_offset", 300, "whole numbers"),
    ("modelslim w8a8 of float16", "deq_scale", 1 << 40, "bits of a float32"),
    ("modelslim w8a8 of float16", "deq_scale", 0x7F800000, "not finite"),
    ("modelslim w8a8 dynamic", "weight_offset", 0.25, "whole numbers"),
    ("golden stick w8a8", "input_offset", 99, "an offset of its own"),
    ("golden stick w8a8", "input_scale", 77, "differs from that of"),
    ("golden stick w8a8", "beta", 1, "outlier suppression"),
]


@pytest.mark.parametrize(("name", "end", "value", "text"), VALUES)
def test_values_that_cannot_be(name: str, end: str, value: Any, text: str, tmp_path: Path) -> None:
    refused(name, copy_with(name, tmp_path, set_values(end, value)), MODULE, text)


def test_orders_that_differ(tmp_path: Path) -> None:
    """q, k and v are one product: their inputs can only be in one order."""

    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.g_idx"] = tensors[f"{MODULE}.g_idx"][::-1].copy()

    name = "gptq, activation order"
    refused(name, copy_with(name, tmp_path, change), MODULE, "q_proj", "different activation orders")


@pytest.mark.parametrize("name", ["compressed-tensors w8a8 dynamic", "gptq", "modelslim w8a8", "fp8"])
def test_truncated(name: str, tmp_path: Path) -> None:
    folder = copy_with(name, tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    refused(name, folder, "truncated")


def edit_description(folder: Path, **values: Any) -> None:
    (file,) = [*folder.glob("quant*.json")]
    content = json.loads(file.read_text())
    for name, value in values.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    file.write_text(json.dumps(content))


DISAGREEMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({f"{OTHER}.weight": None}, ("no scheme", OTHER)),
    ({f"{OTHER}.weight": "FLOAT"}, (OTHER, "FLOAT", "W8A8")),
    (
        {
            f"{MODULE}.{end}": "W8A8_DYNAMIC"
            for end in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
        },
        (MODULE, "must be quantized alike"),
    ),
    (
        {
            f"{OTHER}.{end}": "W8A8_DYNAMIC"
            for end in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
        },
        (OTHER, "weight_scale", "missing"),
    ),
    (
        {f"{OTHER}.{end}": "FLOAT" for end in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")},
        (OTHER, "I8"),
    ),
    ({"model.embed_tokens.weight": "W9A9"}, ("W9A9", "embed_tokens")),
    ({"group_size": "many"}, ("group_size",)),
]


@pytest.mark.parametrize(("values", "texts"), DISAGREEMENTS)
def test_a_description_that_disagrees(values: dict[str, Any], texts: tuple[str, ...], tmp_path: Path) -> None:
    folder = copy_with("modelslim w8a8", tmp_path, lambda tensors: None)
    edit_description(folder, **values)
    refused("modelslim w8a8", folder, *texts)


def test_a_description_that_is_no_json(tmp_path: Path) -> None:
    folder = copy_with("modelslim w8a8", tmp_path, lambda tensors: None)
    (folder / "quant_model_description.json").write_text('{"a.weight": "W8A8", "a.weight": "FLOAT"}')
    refused("modelslim w8a8", folder, "not valid JSON", "twice")
    shutil.copy(folder / "config.json", folder / "quantization_description.json")
    (folder / "quant_model_description.json").write_text("{}")
    refused("modelslim w8a8", folder, "both quant_model_description.json and quantization_description.json")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_damage(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One or two tensors lost, renamed, cut, retyped or swapped: a CheckpointError, or the model is as good as before
    (what was lost was not used)."""
    name = data.draw(st.sampled_from(sorted(SCHEMES)))
    used = [end for end in ends(name) if not redundant(name, end)]

    def change(tensors: Tensors) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            chosen = (
                f"{data.draw(st.sampled_from((MODULE, MODULE.replace('k_', 'v_'))))}.{data.draw(st.sampled_from(used))}"
            )
            if chosen not in tensors:
                continue
            kind = data.draw(st.sampled_from(("lose", "rename", "cut", "retype", "flatten")))
            tensor = tensors.pop(chosen)
            if kind == "rename":
                tensors[chosen + "_"] = tensor
            elif kind == "cut":
                tensors[chosen] = tensor[: len(tensor) // 2]
            elif kind == "retype":
                tensors[chosen] = np.zeros(tensor.shape, np.uint8)
            elif kind == "flatten":
                tensors[chosen] = tensor.reshape(1, 1, -1)

    refused(name, copy_with(name, tmp_path_factory.mktemp("damaged"), change))
