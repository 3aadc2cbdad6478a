"""Rotary tables against transformers' float32 modules, and the conventions shared with vLLM.

Where the bounds come from. All steps from the powers theta^(2i/d) to the angle are the same float32 operations as in
transformers, so equal powers give bit-equal frequencies and angles, and cos and sin differ by the last unit of two
roundings (torch's vectorized functions are good to a unit). torch's float32 power, too, is only good to a unit, and
differs by instruction set; such a pair of features (about one in a hundred) carries a frequency off by a few units,
and an angle off by that times the position. `assert_table` therefore allows each pair exactly its own frequency
error, and `assert_frequencies` bounds that.
"""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from vllm_ms_models.layers.rope import RopeParameters, cos_sin_table, covered_positions, inverse_frequencies

UNIT = 2.0**-23  # of float32
LONGEST = 131072

LLAMA_SIZES: dict[str, Any] = {"hidden_size": 4096, "num_attention_heads": 32}
PHI3_SIZES: dict[str, Any] = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}
LONGROPE: dict[str, Any] = {
    "type": "longrope",
    "short_factor": [1.0 + 0.04 * i for i in range(48)],
    "long_factor": [1.0 + 0.03 * i * i for i in range(48)],
}
LLAMA31: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK_SIZES: dict[str, Any] = {"qk_rope_head_dim": 64, "max_position_embeddings": 163840, "rope_theta": 10000}
TYPES: dict[str, dict[str, Any]] = {  # the entries of a valid rope of each type, for head_dim 128
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA31,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192},
    "longrope": {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 8192},
}

# name: (config class, rotary module, config.json entries as published, max_model_len)
REAL: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "Llama 2": (LlamaConfig, LlamaRotaryEmbedding, LLAMA_SIZES | {"max_position_embeddings": 4096}, 4096),
    "Llama 2, linear (LongChat)": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        LLAMA_SIZES | {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 8.0}},
        32768,
    ),
    "Llama 2, dynamic": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        LLAMA_SIZES | {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        4096,
    ),
    "Llama 3.1 8B": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        LLAMA_SIZES
        | {
            "max_position_embeddings": LONGEST,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA31 | {"rope_type": "llama3"},
        },
        LONGEST,
    ),
    "Llama 3.2 1B": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        {"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64, "max_position_embeddings": LONGEST}
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA31 | {"rope_type": "llama3", "factor": 32.0}},
        LONGEST,
    ),
    "Mistral 7B": (
        MistralConfig,
        MistralRotaryEmbedding,
        LLAMA_SIZES | {"max_position_embeddings": 32768, "rope_theta": 1000000.0},
        32768,
    ),
    "Qwen2.5 7B": (
        Qwen2Config,
        Qwen2RotaryEmbedding,
        {"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768, "rope_theta": 1000000.0},
        32768,
    ),
    "Qwen2.5 7B, YaRN": (
        Qwen2Config,
        Qwen2RotaryEmbedding,
        {"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        LONGEST,
    ),
    "YaRN, not truncated (gpt-oss)": (
        LlamaConfig,
        LlamaRotaryEmbedding,
        {"hidden_size": 2880, "num_attention_heads": 64, "head_dim": 64, "max_position_embeddings": LONGEST}
        | {"rope_theta": 150000, "rope_scaling": DEEPSEEK | {"factor": 32.0, "truncate": False}},
        LONGEST,
    ),
    "DeepSeek-V3": (
        DeepseekV3Config,
        DeepseekV3RotaryEmbedding,
        DEEPSEEK_SIZES | {"rope_scaling": DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        LONGEST,
    ),
    "DeepSeek, two mscales": (
        DeepseekV3Config,
        DeepseekV3RotaryEmbedding,
        DEEPSEEK_SIZES | {"rope_scaling": DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 0.707}},
        LONGEST,
    ),
    "Phi-3 mini 128k, short": (
        Phi3Config,
        Phi3RotaryEmbedding,
        PHI3_SIZES | {"original_max_position_embeddings": 4096, "rope_scaling": LONGROPE},
        4096,
    ),
    "Phi-3 mini 128k, long": (
        Phi3Config,
        Phi3RotaryEmbedding,
        PHI3_SIZES | {"original_max_position_embeddings": 4096, "rope_scaling": LONGROPE},
        LONGEST,
    ),
    "Phi-4 mini, partial": (
        Phi3Config,
        Phi3RotaryEmbedding,
        PHI3_SIZES
        | {"num_attention_heads": 24, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096}
        | {"rope_scaling": LONGROPE},
        4096,
    ),
    "default, partial": (Phi3Config, Phi3RotaryEmbedding, PHI3_SIZES | {"partial_rotary_factor": 0.5}, LONGEST),
}


def hf(config_class: Any, entries: dict[str, Any]) -> Any:
    """transformers' config from config.json entries (which it changes; so it gets a copy)."""
    sizes = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return config_class(**sizes, **copy.deepcopy(entries))


def llama(rope_type: str, **entries: Any) -> Any:
    """A Llama config object with a rope of this type, length 32768."""
    values = {"rope_type": rope_type, "rope_theta": 500000.0} | TYPES[rope_type]
    return hf(LlamaConfig, LLAMA_SIZES | {"max_position_embeddings": 32768, "rope_parameters": values} | entries)


def raw(rope_type: str = "default", /, **values: Any) -> dict[str, Any]:
    """A config.json with a rope of this type; a value of None removes an entry."""
    kept = {key: value for key, value in (TYPES.get(rope_type, {}) | values).items() if value is not None}
    return LLAMA_SIZES | {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": rope_type} | kept}


def assert_frequencies(parameters: RopeParameters, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to a few units: a unit in the power is up to two in its reciprocal, and each scaling step may round
    once more. Llama 3's blend multiplies the unscaled frequency by a weight of its own error."""
    units, scale = 4.0, theirs
    if parameters.rope_type == "llama3":
        units += 4 * parameters.high_freq_factor / (parameters.high_freq_factor - parameters.low_freq_factor)
        scale = theirs * parameters.factor
    assert ours.dtype == theirs.dtype == np.float32
    assert np.all(np.abs(ours.astype(np.float64) - theirs) <= units * UNIT * scale)


def assert_table(parameters: RopeParameters, module: Any, max_model_len: int, positions: np.ndarray) -> None:
    """The table's rows equal the module's cos and sin, as far as the frequencies do (see the head of this file)."""
    table = cos_sin_table(parameters, int(positions.max()) + 1, max_model_len)
    assert table.dtype == np.float32 and table.shape == (positions.max() + 1, parameters.rotary_size)
    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.from_numpy(positions)[None])
    half = parameters.rotary_size // 2
    expected = np.concatenate([cos[0, :, :half], sin[0, :, :half]], axis=1)
    ours, theirs = inverse_frequencies(parameters, max_model_len), module.inv_freq.numpy()
    assert_frequencies(parameters, ours, theirs)
    moved = positions[:, None] * np.abs(ours.astype(np.float64) - theirs)
    moved += np.where(moved > 0, UNIT * positions[:, None] * theirs, 0)  # then the products round apart, too
    bound = parameters.attention_scaling * (np.concatenate([moved, moved], axis=1) + 2 * UNIT)
    assert np.all(np.abs(table[positions].astype(np.float64) - expected) <= bound)


def sampled(length: int) -> np.ndarray:
    """Positions below `length`: the first, the last, and some between."""
    between = np.random.default_rng(length).integers(0, length, 2000)
    return np.unique(np.concatenate([np.arange(64), between, np.arange(length - 64, length)]))


@pytest.mark.parametrize("name", REAL)
def test_real_config_matches_transformers(name: str) -> None:
    config_class, module_class, entries, max_model_len = REAL[name]
    config = hf(config_class, entries)
    module, parameters = module_class(config), RopeParameters.from_config(config)
    assert_table(parameters, module, max_model_len, sampled(max_model_len))
    assert parameters.attention_scaling == pytest.approx(module.attention_scaling, rel=1e-12)
    equal = inverse_frequencies(parameters, max_model_len) == module.inv_freq.numpy()
    assert equal.mean() >= 0.9  # one or two pairs may carry torch's error in the power


@pytest.mark.parametrize("name", REAL)
def test_raw_config_parses_as_transformers_normalises_it(name: str) -> None:
    config_class, _, entries, _ = REAL[name]
    config = hf(config_class, entries)
    parsed = RopeParameters.from_config(config)
    assert RopeParameters.from_config(entries) == parsed  # config.json as published: rope_theta and rope_scaling
    assert RopeParameters.from_config(config.to_dict()) == parsed  # as transformers 5 saves it: rope_parameters
    assert RopeParameters.from_config(SimpleNamespace(**entries)) == parsed


@st.composite
def llama_configs(draw: st.DrawFn) -> Any:
    rope_type = draw(st.sampled_from(sorted(TYPES)))
    head_dim = 2 * draw(st.integers(2, 64))
    numbers = partial(st.floats, allow_nan=False, width=64)
    values: dict[str, Any] = {"rope_type": rope_type, "rope_theta": draw(numbers(2.0, 1e8))}
    length = draw(st.integers(64, 4096))
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        values["factor"] = draw(st.one_of(st.integers(1, 64), numbers(1.0, 64.0)))
    if rope_type == "llama3":
        low = draw(numbers(0.1, 8.0))
        values |= {"low_freq_factor": low, "high_freq_factor": low + draw(numbers(0.5, 8.0))}
    if rope_type == "yarn":
        slow = draw(numbers(0.25, 4.0))
        optional = {
            "beta_slow": st.just(slow),
            "beta_fast": numbers(max(slow, 8.0), 64.0),
            "mscale": numbers(0.5, 2.0),
            "mscale_all_dim": numbers(0.5, 2.0),
            "attention_factor": numbers(0.5, 2.0),
            "truncate": st.booleans(),
        }
        values |= draw(st.fixed_dictionaries({}, optional=optional))
    if rope_type == "longrope":
        pairs = st.lists(numbers(1.0, 64.0), min_size=head_dim // 2, max_size=head_dim // 2)
        values |= {"short_factor": draw(pairs), "long_factor": draw(pairs)}
        values |= draw(st.fixed_dictionaries({}, optional={"factor": numbers(1.0, 64.0)}))
    if rope_type in ("llama3", "yarn", "longrope") and draw(st.booleans()):
        values["original_max_position_embeddings"] = draw(st.integers(32, length))
    return hf(LlamaConfig, {"head_dim": head_dim, "max_position_embeddings": length, "rope_parameters": values})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=llama_configs(), data=st.data())
def test_any_config_matches_transformers(config: Any, data: st.DataObject) -> None:
    """Positions up to 131072, except that dynamic and longrope are compared within the original length."""
    parameters, module = RopeParameters.from_config(config), LlamaRotaryEmbedding(config)
    longest = LONGEST
    if parameters.rope_type in ("dynamic", "longrope"):
        longest = parameters.original_max_position
    length = data.draw(st.integers(1, longest))
    positions = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=50)))
    assert_table(parameters, module, length, positions)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=llama_configs(), fraction=st.floats(0.3, 1.0), max_model_len=st.integers(1, LONGEST))
def test_partial_frequencies_match_rope_init_functions(config: Any, fraction: float, max_model_len: int) -> None:
    """At any length: beyond the original one, dynamic and longrope are transformers' for max_model_len tokens."""
    rope = config.rope_parameters | {"partial_rotary_factor": fraction}
    config = hf(LlamaConfig, {"head_dim": 128, "max_position_embeddings": config.max_position_embeddings})
    pairs = int(128 * fraction) // 2
    for key in {"short_factor", "long_factor"} & set(rope):
        rope[key] = (rope[key] * 64)[:pairs]
    if int(128 * fraction) % 2 and rope["rope_type"] in ("yarn", "longrope"):
        rope["partial_rotary_factor"] = 2 * pairs / 128  # transformers has the odd size for the other types only
    config.rope_parameters = rope
    parameters = RopeParameters.from_config(config)
    if parameters.rope_type == "default":
        config.rope_parameters = rope | {"rope_type": "linear", "factor": 1.0}
    theirs, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None, seq_len=max_model_len)
    ours = inverse_frequencies(parameters, max_model_len)
    assert ours.shape == theirs.shape == (parameters.rotary_size // 2,)
    assert parameters.attention_scaling == pytest.approx(scaling, rel=1e-12)
    assert_frequencies(parameters, ours, theirs.numpy())


def test_longrope_switches_by_max_model_len() -> None:
    config = llama("longrope")
    parameters = RopeParameters.from_config(config)
    short, long = (cos_sin_table(parameters, 8192, max_model_len) for max_model_len in (8192, 8193))
    assert not np.array_equal(short, long)
    assert np.array_equal(short, cos_sin_table(parameters, 8192))
    module = LlamaRotaryEmbedding(config)
    assert_table(parameters, module, 8192, np.arange(8192))  # a prompt of the original length
    assert_table(parameters, module, 8193, np.arange(8193))  # one token more: all its positions change
    assert_table(parameters, module, 8192, np.arange(100))  # and transformers goes back for the next prompt


def test_dynamic_is_unscaled_within_the_original_length() -> None:
    scaled, plain = (RopeParameters.from_config(llama(rope_type)) for rope_type in ("dynamic", "default"))
    assert np.array_equal(cos_sin_table(scaled, 32768), cos_sin_table(plain, 32768))
    assert not np.array_equal(cos_sin_table(scaled, 32768, 32769), cos_sin_table(plain, 32768))


@pytest.mark.parametrize("rows", [0, 1, 8191, 8192, 8193, 20000])
def test_rows_do_not_depend_on_how_many_there_are(rows: int) -> None:
    parameters = RopeParameters.from_config(raw("yarn"))
    table, longer = cos_sin_table(parameters, rows), cos_sin_table(parameters, 20001)
    assert table.shape == (rows, 128) and table.flags.c_contiguous
    assert np.array_equal(table, longer[:rows])
    if rows:  # attention scaling is part of the table
        assert np.array_equal(table[0], np.array([0.1 * np.log(4) + 1] * 64 + [0] * 64, np.float32))


NESTED = {
    "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def test_nested_rope_parameters() -> None:
    entries = LLAMA_SIZES | {"max_position_embeddings": 1024, "rope_parameters": NESTED}
    for config in (entries, SimpleNamespace(**entries)):
        full, sliding = (RopeParameters.from_config(config, layer_type) for layer_type in NESTED)
        assert (full.rope_type, full.factor, full.theta) == ("yarn", 4.0, 1000000.0)
        assert full.original_max_position == 1024
        assert (sliding.rope_type, sliding.theta) == ("default", 10000.0)
        assert covered_positions([full, sliding], config) == 4096
    for layer_type in (None, "chunked_attention"):
        with pytest.raises(ValueError, match=r"entry for layer type .* 'full_attention', 'sliding_attention'"):
            RopeParameters.from_config(entries, layer_type)
    assert RopeParameters.from_config(raw("linear"), "full_attention") == RopeParameters.from_config(raw("linear"))


def test_precedence_and_defaults() -> None:
    parse = RopeParameters.from_config
    assert parse(LLAMA_SIZES).theta == 10000.0 and parse(LLAMA_SIZES).rope_type == "default"
    assert parse(LLAMA_SIZES | {"rope_theta": 5e5, "rope_scaling": None}).theta == 5e5
    assert parse(raw(rope_theta=7.0) | {"rope_theta": 5e5}).theta == 7.0
    assert parse(raw("yarn") | {"original_max_position_embeddings": 512}).original_max_position == 512
    assert parse(raw("yarn", original_max_position_embeddings=None)).original_max_position == 32768
    assert parse(raw() | {"head_dim": 80}).head_dim == 80
    assert parse(raw() | {"head_dim": None}).head_dim == 128
    assert parse(raw() | {"qk_rope_head_dim": 64}).head_dim == 64
    assert parse(raw(partial_rotary_factor=0.25) | {"partial_rotary_factor": 0.5}).rotary_size == 32
    assert parse(raw() | {"partial_rotary_factor": 0.5}).rotary_size == 64
    assert parse(LLAMA_SIZES | {"max_position_embeddings": 9, "rope_scaling": TYPES["longrope"] | {"type": "su"}})
    assert parse(raw("yarn", attention_factor=0.5, mscale=2.0, mscale_all_dim=1.0)).attention_scaling == 0.5
