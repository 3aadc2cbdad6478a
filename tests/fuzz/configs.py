"""Descriptions of quantization, and rope configs: a scheme or a table, or one sentence, and never another exception."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import mutation
from tests.fuzz.files import sentence
from tests.fuzz.mutation import Check
from tests.layers.test_rope import raw
from tests.quantization.writers_compressed import SCHEMES
from tests.quantization.writers_others import AWQ_CONFIG, FP8_CONFIG, META, gptq_config
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.layers.rope import RopeParameters, cos_sin_table, covered_positions
from vllm_ms_models.quantization.formats import DESCRIPTIONS, from_config
from vllm_ms_models.quantization.specs import Spec

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens", "")
WORDS = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W8A16", "W4A8", "group_size", "version", "rank_0", "metadata")
QUANTIZATION_WORDS: list[Any] = [
    *("compressed-tensors", "fp8", "awq", "gptq", "quant_method", "int-quantized", "pack-quantized", "float-quantized"),
    *("mixed-precision", "channel", "tensor", "group", "token", "block", "weight", "static", "dynamic", "int", "float"),
    *("num_bits", "group_size", "bits", "targets", "ignore", "weights", "input_activations", "actorder", "desc_act"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "weight_block_size", "block_structure", "gptq_v2"),
    *(4, 8, 128, -1, True, False, None, ["Linear"], ["re:.*"], [128, 128], "128x128", [["a"]], [[1]], {"+:.*": {}}),
    *({"-:.*": {}}, {"+:.*": {"bits": 8}}, {"+:.*": []}, {"num_bits": 8}, {"format": "dense"}, "gemm", "e4m3", "ue8m0"),
    *(f"{'9' * 5000}x1", "²x1", "٣x٣", *MODULES),
]
ROPE_WORDS: list[Any] = [
    *("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "rope_type", "type", "factor", "rope_theta"),
    *("rope_scaling", "rope_parameters", "head_dim", "max_position_embeddings", "partial_rotary_factor", "beta_fast"),
    *("beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "original_max_position_embeddings", "model_type", "model_max_length", "gemma3"),
    *("max_seq_len", "hidden_size", "num_attention_heads", "qk_rope_head_dim", "alpha", "mrope_section"),
    *(
        [1.0] * 64,
        [1e300] * 64,
        [1e-300] * 64,
        [1e-30] * 64,
        [0] * 64,
        [1.0] * 3,
        1e300,
        1e-300,
        3,
        2,
        1,
        0.25,
        1e6,
        True,
        None,
    ),
]


@contextmanager
def quantization() -> Iterator[Check]:
    """`quantization_config` dictionaries and description files, and what they say about some modules."""
    configs = [scheme.config for scheme in SCHEMES.values() if scheme.config is not None]
    configs += [FP8_CONFIG, AWQ_CONFIG, gptq_config(4, 128, True), gptq_config(8, 0, False, 2, ordered=True)]
    ends = ("weight", "deq_scale", "quant_bias", "bias")
    described = META | {f"{module}.{end}": "W8A8" for module in MODULES[:2] for end in ends}
    for module in MODULES[:2]:
        described[f"{module}.bias"] = "FLOAT"

    def check(rng: Random) -> str:
        try:
            if rng.random() < 0.7:
                config = mutation.tree(rng, dict(rng.choice(configs)), QUANTIZATION_WORDS)
                format: Any = from_config(config, rng.random() < 0.5)
            else:
                content = mutation.tree(rng, described, [*WORDS, *MODULES])
                format = rng.choice(list(DESCRIPTIONS.values()))(content)
        except CheckpointError as error:
            sentence(error)
            return "refused"
        for module in MODULES:
            try:
                assert isinstance(format.spec(module), Spec)
            except CheckpointError as error:
                sentence(error)
        return "taken"

    yield check


@contextmanager
def rope() -> Iterator[Check]:
    """Rope configs; a table that is made has no NaN, and no value beyond the attention scaling."""
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    bases = [raw(kind) for kind in kinds] + [raw(kind) | {"head_dim": 8} for kind in kinds[:5]]

    def check(rng: Random) -> str:
        config = mutation.tree(rng, rng.choice(bases), ROPE_WORDS)
        if not isinstance(config, dict):
            config = {}
        try:
            parameters = RopeParameters.from_config(config, rng.choice((None, "full_attention", "a")))
            covered = covered_positions(parameters, config)
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            text = str(error)
            assert "\n" not in text and len(text) < 2000, f"not a sentence: {text[:300]!r}"
            assert " must " in text or "not supported" in text, f"not a sentence of ours: {text[:300]!r}"
            text.encode()
            return "refused"
        assert type(covered) is int and covered > 0
        if parameters.rotary_size <= 1024:
            with np.errstate(all="ignore"):
                table = cos_sin_table(parameters, 8, min(covered, 1 << 40))
            assert np.isfinite(table).all(), f"{parameters} makes {table}"
            assert math.isfinite(parameters.softmax_factor)
        return "taken"

    yield check
