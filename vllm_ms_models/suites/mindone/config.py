"""A config of transformers 5 as mindone reads it: it is written for transformers 4.57."""

import copy
from typing import Any

from vllm_ms_models.suites import OPTION, SuiteError

# Of these, frequencies depend on the longest sequence of a step, and mindone takes the others' with it.
BY_LENGTH = ("dynamic", "longrope")


def as_mindone_reads(config: Any, attention: str) -> Any:
    """A copy of `config` with the names of transformers 4.57, for models whose attention is called `attention`.

    SuiteError for rotary embeddings that mindone cannot compute for several sequences at once.
    """
    config = copy.deepcopy(config)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope and "rope_type" not in rope:
        raise SuiteError(
            f"rope_parameters of several kinds of layers are not supported with {OPTION} 'mindone'; leave it out."
        )
    kind = rope.get("rope_type", "default")
    if kind in BY_LENGTH:
        raise SuiteError(
            f"Rotary embeddings of the type {kind!r} are not supported with {OPTION} 'mindone', whose frequencies are "
            "those of the longest sequence in a batch; leave it out."
        )
    later: dict[str, Any] = {
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else rope,
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
