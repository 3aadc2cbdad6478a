"""What mindone makes of a config: which models it cannot run for us, and the names that it reads. No MindSpore here.

It is written for transformers 4.57; configs are those of transformers 5.
"""

import copy
from typing import Any

from vllm_ms_models.suites import OPTION, SuiteError

# Of these, frequencies depend on the longest sequence of a step, and mindone takes the others' with it.
BY_LENGTH = ("dynamic", "longrope")

# What heads are split by: how transformers' plan calls these, or it has none that mindone's modules could follow.
PROJECTIONS = tuple(f"layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))


def check(architecture: str, config: Any, ranks: int) -> None:
    """SuiteError for a model whose config asks for what mindone does not do, or not on so many ranks."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and "rope_type" not in rope:
        raise SuiteError(
            f"Rotary embeddings that differ between layers are not supported with {OPTION} 'mindone'; leave it out."
        )
    if rope.get("rope_type") in BY_LENGTH:
        raise SuiteError(
            f"Rotary embeddings of the type {rope['rope_type']!r} are not supported with {OPTION} 'mindone', whose "
            "frequencies are those of the longest sequence in a batch; leave it out."
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise SuiteError(
            f"clip_qkv is not supported with {OPTION} 'mindone', which does it by an operator that MindSpore has for "
            "Ascend only; serve another model."
        )
    if ranks > 1 and {plan(config).get(name) for name in PROJECTIONS} != {"colwise"}:
        raise SuiteError(
            f"--tensor-parallel-size {ranks} is not supported for {architecture} of mindone, for whose heads "
            f"transformers has no plan; use 1, or leave out {OPTION}."
        )


def plan(config: Any) -> dict[str, str]:
    """How transformers splits the linears of this model: patterns of names -> colwise, rowwise and others."""
    return dict(config.base_model_tp_plan or {})


def as_mindone_reads(config: Any, attention: str) -> Any:
    """A copy of `config` with the names of transformers 4.57, for models whose attention is called `attention`."""
    config = copy.deepcopy(config)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    later: dict[str, Any] = {
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "use_return_dict": False,
        "use_cache": False,
        "output_attentions": False,
        "output_hidden_states": False,
        "pretraining_tp": 1,
        "attention_dropout": 0.0,
        "_attn_implementation_internal": attention,
    }
    if "partial_rotary_factor" in rope:
        later["partial_rotary_factor"] = rope["partial_rotary_factor"]
    # Some of these are properties of the class, which would come before what an instance has.
    config.__class__ = type(type(config).__name__, (type(config),), dict.fromkeys(later))
    vars(config).update(later)
    return config
