"""What a rope config is refused for, and how long a sequence it covers: one sentence each, and vLLM's own lengths."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import Gemma3TextConfig

from tests.layers.test_rope import LLAMA_SIZES, UNIT, llama, raw
from vllm_ms_models.layers.rope import RopeParameters, cos_sin_table, covered_positions

ERRORS = {
    "unknown type": (raw("fractal"), "rope type 'fractal' is not supported"),
    "unhashable type": (LLAMA_SIZES | {"rope_scaling": {"type": ["yarn"]}}, r"rope type \['yarn'\] is not supported"),
    "yarn without factor": (raw("yarn", factor=None), "'yarn': factor must be a number of at least 1.* no value"),
    "linear factor": (raw("linear", factor="4"), "'linear': factor must be a number of at least 1.*'4'"),
    "factor below 1": (raw("dynamic", factor=0.5), "'dynamic': factor must be a number of at least 1.* 0.5"),
    "boolean factor": (raw("linear", factor=True), "factor must be a number.* True"),
    "infinite factor": (raw("linear", factor=float("inf")), "factor must be a number.* inf"),
    "llama3 without low": (raw("llama3", low_freq_factor=None), "'llama3': low_freq_factor must be a number above 0"),
    "llama3 low = high": (raw("llama3", high_freq_factor=1.0), "high_freq_factor must be a number above 1.* 1.0"),
    "original": (raw("llama3", original_max_position_embeddings=1.5), "original_max.* whole number .* 1.5"),
    "no length": (raw("dynamic") | {"max_position_embeddings": None}, "max_position_embeddings must be a whole number"),
    "longrope length": (raw("longrope", long_factor=[1.0] * 48), "long_factor must be a list of 64 numbers .*not 48"),
    "longrope entry": (raw("longrope", short_factor=["1"] * 64), "short_factor must be a list of numbers above 0"),
    "longrope absent": (raw("longrope", short_factor=None), "short_factor must be a list .* no value for it"),
    "beta": (raw("yarn", beta_fast=0.5), "beta_fast must be a number of at least 1.* 0.5"),
    "truncate": (raw("yarn", truncate="no"), "truncate must be true or false.* 'no'"),
    "theta": (raw(rope_theta=-1), "rope_theta must be a number above 1.* -1"),
    "partial above 1": (raw(partial_rotary_factor=1.5), "partial_rotary_factor must be such that 2 to 128 features"),
    "partial of nothing": (raw(partial_rotary_factor=0.001), "partial_rotary_factor must be such that 2 to 128"),
    "odd head": (raw() | {"head_dim": 7}, "2 to 7 features rotate, in pairs"),
    "head_dim": (raw() | {"head_dim": "64"}, "head_dim must be a whole number of 1 to 65536.* '64'"),
    "head beyond memory": (raw() | {"head_dim": 10**12}, "head_dim must be a whole number of 1 to 65536.* 10000000"),
    "no head of two": (
        LLAMA_SIZES | {"hidden_size": 3, "num_attention_heads": 4},
        "hidden_size / num_attention_heads must be 1 to 65536.* 0",
    ),
    "number beyond floats": (raw("linear", factor=10**400), "factor must be a number of at least 1.* 1000000"),
    "number beyond float32": (raw("yarn", attention_factor=1e300), "attention_factor must be a number.* 1e"),
    "number below float32": (raw("yarn", beta_slow=5e-324), "beta_slow must be a number above 0.* 5e-324"),
    "longrope entry of nothing": (
        raw("longrope", short_factor=[1e-300] * 64),
        "short_factor must be a list of numbers",
    ),
    "endless type": (raw("x" * 100_000), r"rope type 'x{159}\.\.\. is not supported"),
    "no head": ({"rope_theta": 1e4}, "hidden_size must be a whole number of at least 1.* no value for it"),
    "other rope": (raw("dynamic", alpha=1000.0), "'dynamic': alpha must be absent .*not supported.* 1000.0"),
    "mrope": (raw(mrope_section=[16, 24, 25]), r"mrope_section must be a list .* add up to 64 .*\[16, 24, 25\]"),
    "mrope, other order": (raw(mrope_interleaved=True), r"mrope_interleaved must be absent"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence(name: str) -> None:
    config, message = ERRORS[name]
    with pytest.raises(ValueError, match=message) as error:
        RopeParameters.from_config(config)
    assert "default, linear, dynamic, llama3, yarn, longrope" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_before_the_type_is_known() -> None:
    with pytest.raises(ValueError, match="rope_type and type must agree, but the config has 'yarn' and 'linear'"):
        RopeParameters.from_config(raw("yarn", type="linear"))
    with pytest.raises(ValueError, match=r"must be a mapping, but the config has \['yarn'\]"):
        RopeParameters.from_config(LLAMA_SIZES | {"rope_scaling": ["yarn"]})
    with pytest.raises(ValueError, match="max_position_embeddings must be in the config"):
        covered_positions(RopeParameters.from_config(LLAMA_SIZES), LLAMA_SIZES)


@pytest.mark.parametrize("value", ["much", [512], 0, -1, float("nan"), float("inf"), True])
def test_a_length_that_is_none(value: object) -> None:
    config = LLAMA_SIZES | {"max_position_embeddings": 512, "max_seq_len": value}
    with pytest.raises(ValueError, match="max_seq_len must be a number of at least 1, but the config has"):
        covered_positions(RopeParameters.from_config(LLAMA_SIZES), config)


COVERED = {  # how far: 32768 is max_position_embeddings
    "default": (llama("default"), 32768),
    "linear": (llama("linear"), 131072),
    "dynamic": (llama("dynamic"), 65536),
    "llama3": (llama("llama3"), 32768),
    "yarn, scaled length": (llama("yarn"), 32768),
    "yarn, unscaled length": (llama("yarn", max_position_embeddings=8192), 32768),
    "longrope": (llama("longrope"), 32768),
    "fractional factor": (llama("linear", rope_parameters={"rope_type": "linear", "factor": 1.1}), 36044),
    "model_max_length": (llama("linear", model_max_length=10000), 40000),
    "smallest length": (llama("default", max_sequence_length=2048), 2048),
    "Gemma 3": (Gemma3TextConfig(), 131072),
}


@pytest.mark.parametrize("name", COVERED)
def test_covered_positions_agree_with_vllm(name: str) -> None:
    """vLLM never derives a length beyond ours, and accepts exactly ours (for yarn it may stop earlier)."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config, covered = COVERED[name]
    layer_types = [key for key, value in config.rope_parameters.items() if isinstance(value, dict)] or [None]
    ropes = [RopeParameters.from_config(config, layer_type) for layer_type in layer_types]
    assert covered_positions(ropes, config) == covered
    assert covered_positions(ropes, config.to_dict()) == covered
    length = SimpleNamespace(
        derived_max_model_len_and_key=ModelArchConfigConvertorBase(config, config).derive_max_model_len_and_key()
    )
    accepts = partial(_get_and_verify_max_len, config, length, None, disable_sliding_window=False, sliding_window=None)
    if name == "yarn, unscaled length":
        covered = 8192
    assert accepts(covered) == covered
    with pytest.raises(ValueError, match="greater than the derived max_model_len"):
        accepts(covered + 1)


def test_beyond_the_original_length_tables_are_those_of_vllm() -> None:
    from vllm.model_executor.layers import rotary_embedding as vllm_rope

    base = SimpleNamespace(rotary_dim=128, base=500000.0, scaling_factor=2.0)
    base.max_position_embeddings, base.max_trained_positions = 50000, 32768
    base._compute_inv_freq = partial(vllm_rope.RotaryEmbedding._compute_inv_freq, base)
    theirs = vllm_rope.DynamicNTKScalingRotaryEmbedding._compute_cos_sin_cache(base).numpy()
    ours = cos_sin_table(RopeParameters.from_config(llama("dynamic")), 50000)
    # A pair of features off by 4 units of frequency, at the last position; others to the last unit.
    assert np.abs(ours - theirs).max() <= 4 * UNIT * 50000
    assert np.median(np.abs(ours - theirs).max(axis=0)) <= 2 * UNIT

    vllm_class = vllm_rope.Phi3LongRoPEScaledRotaryEmbedding
    base._compute_inv_freq = partial(vllm_class._compute_inv_freq, base)
    parameters = RopeParameters.from_config(llama("longrope"))
    scaling = parameters.attention_scaling
    theirs = vllm_class._compute_cos_sin_cache(base, 32768, parameters.long_factor, scaling).numpy()
    ours = cos_sin_table(parameters, 32768)
    assert np.abs(ours - theirs).max() <= 4 * UNIT * 32768 * scaling
    assert np.median(np.abs(ours - theirs).max(axis=0)) <= 2 * UNIT * scaling
