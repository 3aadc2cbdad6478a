"""mindformers in this process, and its network for a model's config.json."""

import contextlib
import inspect
import io
import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import mindspore as ms

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.suites.mindformers.checks import rope_entries

DTYPES = {ms.float32: "float32", ms.float16: "float16", ms.bfloat16: "bfloat16"}


def make(architecture: str, module: str, hf_config: Any, context: ModelContext, device: str) -> Any:
    """The inference network in `module` of mindformers for a configuration of transformers; weights not loaded."""
    start(device)
    network = getattr(import_module(module), f"Inference{architecture}")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table of all options
        return network(network.config_class(**_options(architecture, network.config_class, hf_config, context)))


def start(device: str) -> None:
    """Import mindformers and tell it that it predicts; a second time changes nothing.

    It learns that from environment variables. Its log goes to files of its own, not to this process's output; but for
    errors.
    """
    if device == "cpu":
        os.environ["ENFORCE_EAGER"] = "True"  # operators one by one; on Ascend it compiles graphs unless told so
    folder = Path("~/.cache/vllm_ms_models/mindformers").expanduser()
    os.environ.setdefault("LOCAL_DEFAULT_PATH", str(folder))
    log = os.environ.setdefault("LOG_MF_PATH", str(folder / "log"))
    logging.getLogger(f"mindformers{log}").addFilter(_is_error)
    config_class = import_module("mindformers.tools.register").MindFormerConfig
    target = {"device_target": "CPU", "mode": 1} if device == "cpu" else {"device_target": "Ascend", "mode": 0}
    options = config_class(use_legacy=False, run_mode="predict", context=target, parallel={}, parallel_config={})
    import_module("mindformers.core.context.build_context").build_mf_context(options)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _options(architecture: str, config_class: type, hf_config: Any, context: ModelContext) -> dict[str, Any]:
    """What the configuration says and mindformers reads, in the spelling of transformers 4; and what it leaves open."""
    read = inspect.signature(config_class).parameters
    options = {key: getattr(hf_config, key) for key in read if hasattr(hf_config, key)}  # some have two names
    rope = rope_entries(hf_config)
    options["rope_theta"] = rope.pop("rope_theta", 10000.0)
    options["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    scaled = rope.get("rope_type", "default") != "default"
    # What transformers takes where an entry is left out; mindformers has no such values, or others.
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": hf_config.max_position_embeddings}
    said = {key: value for key, value in rope.items() if value is not None}
    options["rope_scaling"] = yarn | said if scaled else None
    if architecture == "DeepseekV3ForCausalLM" and not scaled:
        options.update(rope_type="rope", rotary_scaling_factor=1.0)  # it takes YaRN for granted
    if architecture == "Qwen2ForCausalLM":
        options["add_qkv_bias"] = True  # always there, and not in config.json
    dtype = DTYPES[context.dtype]
    options.update(compute_dtype=dtype, params_dtype=dtype, rotary_dtype=dtype, layernorm_compute_dtype="float32")
    return options
