"""SmoothQuant: changes no function, follows the paper's formula, and helps where inputs have outliers."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests import checkpoints
from tests.cli.quantizing import CALIBRATION, SIZES, arrays, input_ranges, quantize, report
from tests.reference.torch_reference import LOGPROB_TOLERANCE, logits
from vllm_ms_models import runtime
from vllm_ms_models.cli.quantize import modules
from vllm_ms_models.cli.quantize.calibration import blueprint, calibrate
from vllm_ms_models.cli.quantize.conversion import Conversion
from vllm_ms_models.cli.quantize.layouts import DynamicInt8
from vllm_ms_models.cli.quantize.smoothing import into_norm, migration, smooth
from vllm_ms_models.cli.quantize.source import open_source


def smoothed(folder: Path, ignore: tuple[str, ...] = (), alpha: float = 0.5) -> Conversion:
    source = open_source(str(folder))
    runtime.start(source.dtype)
    plan = blueprint(source, max(map(len, CALIBRATION)))
    selection = modules.select(plan, source, ignore, False)
    statistics = calibrate(plan, CALIBRATION, lambda: None)
    linears = {linear.parts[0].name: [part.name for part in linear.parts] for linear in plan.observer.linears}
    smoothing = smooth(source, selection.modules, linears, statistics, alpha)
    return Conversion(source, selection.modules, DynamicInt8(), statistics, smoothing)


def folded(family: str, conversion: Conversion, **options: bool) -> torch.nn.Module:
    """The float model with smoothed norms, weights and biases."""
    model = checkpoints.random_model(family, **SIZES, **options)
    state = {name: torch.from_numpy(value) for name, value in conversion.smoothing.norms.items()}
    for module in conversion.modules.values():
        weight, bias = conversion.floats(module, slice(0, module.shape[0]))
        state[f"{module.name}.weight"] = torch.from_numpy(weight)
        if bias is not None and module.bias is not None:
            state[module.bias] = torch.from_numpy(bias)
    before = model.state_dict()
    assert set(state) <= set(before) and any(not torch.equal(before[name], value) for name, value in state.items())
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_function_stays(family: str) -> None:
    options = {"mlp_bias": True} if family == "llama" else {}
    exact = checkpoints.random_model(family, **SIZES, **options)
    found = folded(family, smoothed(checkpoints.checkpoint(family, **SIZES, **options)), **options)
    for prompt in checkpoints.random_prompts((1, 20, 50)):
        assert (logits(exact, prompt) - logits(found, prompt)).abs().max() < LOGPROB_TOLERANCE


def test_the_formula_of_the_paper() -> None:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), W the rows of all that shares X; inputs from transformers."""
    alpha = 0.7
    conversion = smoothed(checkpoints.checkpoint("qwen2", **SIZES), alpha=alpha)
    model = checkpoints.random_model("qwen2", **SIZES)
    largest: dict[str, torch.Tensor] = {}
    attention = model.model.layers[1].self_attn
    note = lambda _, x: largest.update(x=torch.maximum(largest.get("x", x[0].abs()[0, 0]), x[0].abs().amax((0, 1))))  # noqa: E731
    attention.q_proj.register_forward_pre_hook(note)
    with torch.inference_mode():
        for prompt in CALIBRATION:
            model(torch.tensor([prompt]))
    weights = torch.cat([getattr(attention, f"{one}_proj").weight for one in "qkv"]).abs().amax(0)
    wanted = largest["x"] ** alpha / weights ** (1 - alpha)
    found = conversion.smoothing.columns["model.layers.1.self_attn.q_proj"]
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-4)


def test_what_is_smoothed() -> None:
    """All but o_proj, whose input is no norm's and no product's; a linear in floats keeps its norm as it is."""
    source = checkpoints.checkpoint("llama", **SIZES)
    origins = smoothed(
        source, ("model.layers.0.self_attn.[qkv]_proj", "model.layers.1.mlp.gate_proj", "*.1.mlp.up_proj")
    )
    layer = "model.layers.{}.mlp.{}_proj".format
    norm = "model.layers.{}.post_attention_layernorm.weight".format
    assert origins.smoothing.origins == {
        layer(0, "gate"): norm(0),
        layer(0, "up"): norm(0),
        layer(0, "down"): layer(0, "up"),
        **{f"model.layers.1.self_attn.{one}_proj": "model.layers.1.input_layernorm.weight" for one in "qkv"},
    }


def test_scales_are_usable_whatever_comes() -> None:
    found = migration(np.array([0, 1, 4, 1e30], np.float32), np.array([1, 0, 1, 1e-30], np.float32), 0.5)
    assert found.tolist() == [1, 1, 2, 1e5]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounded_norms_are_taken_back(dtype: type) -> None:
    """New weight times divisor is the old weight, but for two float32 roundings; zeros and what overflows stay."""
    rng = np.random.default_rng(0)
    weight: np.ndarray = np.concatenate([rng.normal(size=100), [0.0, -2.0]]).astype(dtype)
    exact, new = into_norm(weight, rng.uniform(0.1, 9, 102).astype(np.float32))
    assert new.dtype == weight.dtype
    np.testing.assert_allclose(new.astype(np.float64) * exact, weight.astype(np.float64), rtol=2**-22)
    assert exact[100] == 1 and new[100] == 0


def with_outliers(folder: Path) -> Path:
    """A llama in which four channels of each norm are 60 times as large, and the weights behind as much smaller."""
    model = checkpoints.random_model("llama", **SIZES)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, users in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[3:7] *= 60
                for linear in users:
                    linear.weight[:, 3:7] /= 60
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static"])
def test_outliers(tmp_path: Path, scheme: str) -> None:
    """The step of the inputs is that of the outliers: moving half of 60 into the weights makes it seven times finer."""
    source = with_outliers(tmp_path / "source")
    plain = report(quantize(source, tmp_path / "plain", "--scheme", scheme))["errors"]
    smooth = report(quantize(source, tmp_path / "smooth", "--scheme", scheme, "--smoothquant", "0.5"))["errors"]
    for name, error in plain.items():
        if not name.endswith(("o_proj", "down_proj")):
            assert smooth[name]["output"] < error["output"] / 3, name


def test_static_scales_are_those_of_smoothed_inputs(tmp_path: Path) -> None:
    """The scale is max|x / s| / 127 of the folded model, as transformers computes it."""
    source = checkpoints.checkpoint("qwen2", **SIZES)
    ranges = input_ranges(folded("qwen2", smoothed(source)))
    found = arrays(quantize(source, tmp_path / "out", "--scheme", "w8a8-static", "--smoothquant", "0.5"))
    for name, (low, high) in ranges.items():
        assert found[f"{name}.input_scale"][0] == pytest.approx(max(-low, high) / 127, rel=1e-3), name
