"""What `vllm-ms quantize` writes, against the definitions of its schemes computed with NumPy from the float weights.

A weight is rounded to the nearest step, so that it is off by half a step at most; before, it is divided in float32, and
quotients up to 127 are off by 2^-18 (half a unit in the last place). Scales are one float32 division,
off by one unit of 2^-23 at most.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from tests import checkpoints
from tests.cli.quantizing import (
    CALIBRATION,
    SIZES,
    arrays,
    end,
    input_ranges,
    multiply_of,
    quantize,
    report,
    tensors,
    unpacked,
)
from tests.quantization.models import linears

HALF = 0.5 + 2**-18
CASES = [("qwen2", torch.float32), ("llama", torch.bfloat16), ("qwen2", torch.float16)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def source(request: pytest.FixtureRequest) -> Path:
    family, dtype = request.param
    return checkpoints.checkpoint(family, 0, dtype, **SIZES)


def modules(found: dict[str, np.ndarray]) -> list[str]:
    """Two layers of seven linears."""
    names = sorted(name.removesuffix(".weight") for name in found if name.endswith("_proj.weight"))
    assert len(names) == 14
    return names


def check_rows(weight: np.ndarray, integers: np.ndarray, scales: np.ndarray) -> None:
    """int8 with the scale max|row| / 127."""
    assert integers.dtype == np.int8 and scales.dtype == np.float32 and scales.shape == (len(weight), 1)
    largest = np.abs(weight).max(1, keepdims=True)
    np.testing.assert_allclose(scales, largest / 127, rtol=2**-23)
    assert (np.abs(integers.astype(np.float64) * scales - weight) <= HALF * scales).all()
    assert (np.abs(integers.astype(int)).max(1) == 127).all()


@pytest.mark.parametrize("format", ["compressed-tensors", "modelslim"])
def test_dynamic(source: Path, tmp_path: Path, format: str) -> None:
    out = quantize(source, tmp_path / "out", "--scheme", "w8a8-dynamic", "--format", format, calibrated=False)
    before, after = arrays(source), arrays(out)
    for name in modules(before):
        own = end(after, name)
        check_rows(before[f"{name}.weight"], own["weight"], own["weight_scale"])
        if format == "modelslim":
            assert not own["weight_offset"].any() and own["weight_offset"].shape == own["weight_scale"].shape
    check_rest(source, out)


def check_rest(source: Path, out: Path) -> None:
    """What is not quantized is the same to the bit, and nothing is missing."""
    before, after = tensors(source), tensors(out)
    for name, value in before.items():
        if not name.endswith("_proj.weight") and name in after:
            assert torch.equal(value, after[name]) and value.dtype == after[name].dtype, name
    rest = {name for name in before if not name.endswith(("_proj.weight", "_proj.bias"))}
    assert rest <= set(after)


def test_static(source: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", "--scheme", "w8a8-static")
    before, after = arrays(source), arrays(out)
    for name in modules(before):
        own = end(after, name)
        check_rows(before[f"{name}.weight"], own["weight"], own["weight_scale"])
        assert own["input_scale"].shape == (1,) and own["input_scale"].dtype == np.float32
    for layer in ("model.layers.0", "model.layers.1"):
        for group in (("q", "k", "v"), ("gate", "up")):
            block = "self_attn" if "q" in group else "mlp"
            assert len({float(after[f"{layer}.{block}.{one}_proj.input_scale"][0]) for one in group}) == 1
    check_rest(source, out)


def test_modelslim_static(source: Path, tmp_path: Path) -> None:
    """deq_scale is the product of both scales; quant_bias holds offset and bias, off by half a unit at most."""
    out = quantize(source, tmp_path / "out", "--scheme", "w8a8-static", "--format", "modelslim")
    before, after, words = arrays(source), arrays(out), json.loads((out / "quant_model_description.json").read_text())
    for name in modules(before):
        own = end(after, name)
        scale, offset = own["input_scale"][0], own["input_offset"][0]
        assert offset == int(offset) and -128 <= offset <= 127
        product = own["deq_scale"]
        if json.loads((source / "config.json").read_text())["dtype"] == "float16":
            assert product.dtype == np.int64
            product = product.astype(np.int32).view(np.float32)
        weights = np.abs(before[f"{name}.weight"]).max(1) / np.float32(127)
        np.testing.assert_allclose(product, weights * scale, rtol=2**-22)
        assert (np.abs(own["weight"] * weights[:, None] - before[f"{name}.weight"]) <= HALF * weights[:, None]).all()
        bias = before.get(f"{name}.bias", np.zeros(len(product), np.float32)).astype(np.float64)
        wanted = bias / product - offset * own["weight"].sum(1, dtype=np.int64)
        assert (np.abs(own["quant_bias"] - wanted) <= 0.5 + 1e-6).all()
        assert {words[f"{name}.{one}"] for one in own} == {"W8A8"} and "bias" not in own
    assert words["lm_head.weight"] == "FLOAT" and set(words) >= set(after)
    check_rest(source, out)


def test_w4a16(source: Path, tmp_path: Path) -> None:
    """Nearest steps but for cut values; scales in the model's dtype; groups no worse than with max|group| / 7."""
    out = quantize(source, tmp_path / "out", "--scheme", "w4a16", calibrated=False)
    before, after = arrays(source), arrays(out)
    dtype = tensors(source)["model.norm.weight"].dtype
    for name in modules(before):
        own, weight = end(after, name), before[f"{name}.weight"].astype(np.float64)
        assert tensors(out)[f"{name}.weight_scale"].dtype == dtype
        assert own["weight_shape"].tolist() == list(weight.shape)
        assert own["weight_scale"].shape == (weight.shape[0], weight.shape[1] // 32)
        groups = weight.reshape(len(weight), -1, 32)
        scales = own["weight_scale"].astype(np.float64)[..., None]
        integers = unpacked(own["weight_packed"]).reshape(groups.shape)
        off = np.abs(integers * scales - groups)
        cut = (groups > 7 * scales) | (groups < -8 * scales)
        assert (off <= HALF * scales)[~cut].all()
        assert (integers == np.where(groups > 0, 7, -8))[cut].all()
        plain = torch.from_numpy(np.abs(groups).max(2, keepdims=True).astype(np.float32) / np.float32(7)).to(dtype)
        step = plain.double().numpy()
        error = np.square(np.clip(np.rint(groups / step), -8, 7) * step - groups).sum(2)
        assert (np.square(off).sum(2) <= error * (1 + 1e-5)).all()
    check_rest(source, out)


def test_static_scales_are_those_of_transformers(tmp_path: Path) -> None:
    """Both compute in float32 and sum in other orders; see LOGPROB_TOLERANCE in tests/reference for what that makes."""
    for family in ("qwen2", "llama"):
        source = checkpoints.checkpoint(family, **SIZES)
        found = arrays(quantize(source, tmp_path / family, "--scheme", "w8a8-static"))
        ranges = input_ranges(checkpoints.random_model(family, **SIZES))
        for name, (low, high) in ranges.items():
            assert found[f"{name}.input_scale"][0] == pytest.approx(max(-low, high) / 127, rel=1e-4), name
        slim = arrays(quantize(source, tmp_path / f"{family}s", "--scheme", "w8a8-static", "--format", "modelslim"))
        for name, (low, high) in ranges.items():
            scale, offset = slim[f"{name}.input_scale"][0], slim[f"{name}.input_offset"][0]
            assert scale == pytest.approx((high - low) / 255, rel=1e-4)
            assert abs(offset - (-128 - low / scale)) <= 0.5 + 0.05  # 255 steps, each off by 1e-4


def test_static_scales_of_bfloat16(tmp_path: Path) -> None:
    """Ours is the model as served, in bfloat16: about ten roundings of 2^-9 in each of two layers."""
    source = checkpoints.checkpoint("llama", 0, torch.bfloat16, **SIZES)
    found = arrays(quantize(source, tmp_path / "out", "--scheme", "w8a8-static"))
    exact = checkpoints.random_model("llama", 0, torch.bfloat16, **SIZES).float()
    for name, (low, high) in input_ranges(exact).items():
        assert found[f"{name}.input_scale"][0] == pytest.approx(max(-low, high) / 127, rel=20 * 2**-9), name


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "w4a16"])
def test_compressed_tensors_itself_reads_the_description(tmp_path: Path, scheme: str) -> None:
    source = checkpoints.checkpoint("llama", **SIZES)
    out = quantize(source, tmp_path / "out", "--scheme", scheme)
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(described)
    (group,) = config.config_groups.values()
    assert group.weights is not None and group.weights.num_bits == (4 if scheme == "w4a16" else 8)
    assert config.ignore == ["lm_head"] and group.targets == ["Linear"]
    if scheme == "w4a16":
        assert group.input_activations is None and group.weights.group_size == 32
    else:
        assert group.input_activations is not None
        assert group.input_activations.dynamic == (scheme == "w8a8-dynamic")


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "w4a16"])
def test_reported_errors(tmp_path: Path, scheme: str) -> None:
    """Errors of the weights from the files alone; outputs by the arithmetic of the files on fresh inputs, roughly."""
    source = checkpoints.checkpoint("qwen2", **SIZES)
    out = quantize(source, tmp_path / "out", "--scheme", scheme)
    before, after, told = arrays(source), arrays(out), report(out)
    for name in modules(before):
        own, weight = end(after, name), before[f"{name}.weight"].astype(np.float64)
        if scheme == "w4a16":
            matrix = unpacked(own["weight_packed"]) * np.repeat(own["weight_scale"].astype(np.float64), 32, 1)
        else:
            matrix = own["weight"] * own["weight_scale"].astype(np.float64)
        off = np.linalg.norm(matrix - weight) / np.linalg.norm(weight)
        assert told["errors"][name]["weight"] == pytest.approx(float(off), rel=1e-4)
    exact = output_errors(checkpoints.random_model("qwen2", **SIZES), out)
    for name, wanted in exact.items():
        assert told["errors"][name]["output"] == pytest.approx(wanted, rel=0.35), name  # other rows were sampled
    assert told["tokens"] == 100 and told["prompts"] == 2
    assert told["total"][1] == sum(value.nbytes for value in tensors(out).values())
    text = (out / "quantization_report.md").read_text()
    assert all(f"| {name} |" in text for name in modules(before))
    assert (out / "quantization_report.png").read_bytes().startswith(b"\x89PNG")


def output_errors(model: torch.nn.Module, out: Path) -> dict[str, float]:
    """Relative error of each linear's outputs over all calibration tokens."""
    found = arrays(out)
    inputs: dict[str, list[np.ndarray]] = {}
    for name, module in linears(model).items():
        inputs[name] = []
        module.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].detach().numpy()[0]))
    with torch.inference_mode():
        for prompt in CALIBRATION:
            model(torch.tensor([prompt]))
    errors: dict[str, float] = {}
    for name, module in linears(model).items():
        own = end(found, name)
        own.pop("bias", None)
        x = np.concatenate(inputs[name])
        exact = x.astype(np.float64) @ module.weight.detach().numpy().T.astype(np.float64)
        errors[name] = float(np.linalg.norm(multiply_of(own)(x) - exact) / np.linalg.norm(exact))
    return errors
