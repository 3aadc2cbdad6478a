"""mindformers in this process, and its network for a model's config.json."""

import logging
import os
from importlib import import_module
from typing import Any

import mindspore as ms

from vllm_ms_models import kernels
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.suites import SuiteError

# Of transformers' configurations: what says nothing about the model, or is said in another way (`_options`).
DROPPED = ("architectures", "dtype", "rope_parameters", "torch_dtype", "transformers_version")
DTYPES = {ms.float32: "float32", ms.float16: "float16", ms.bfloat16: "bfloat16"}
# Rope types that its models know, by transformers' names.
ROPE_TYPES = ("default", "yarn")


def make(package: str, hf_config: Any, context: ModelContext) -> Any:
    """The inference network of `mindformers.models.<package>` for a configuration of transformers, weights not loaded.

    SuiteError for what the network would not do as the configuration says.
    """
    _check(hf_config, context)
    start()
    configuration = import_module(f"mindformers.models.{package}.configuration_{package}")
    modelling = import_module(f"mindformers.models.{package}.modeling_{package}_infer")
    (name,) = (name for name in modelling.__all__ if name.startswith("Inference"))
    config_class = getattr(configuration, name.removeprefix("Inference").removesuffix("ForCausalLM") + "Config")
    return getattr(modelling, name)(config_class(**_options(package, hf_config, context)))


def start() -> None:
    """Import mindformers and tell it that it predicts; once in a process.

    It reads what it should do from environment variables. Its log goes to a folder of its own, and here only errors.
    """
    eager = kernels.get().name != "ascend"  # operators one by one; on Ascend it compiles its graphs
    os.environ["ENFORCE_EAGER"] = str(eager)
    folder = os.path.join(os.path.expanduser("~/.cache/vllm_ms_models"), "mindformers")
    log = os.environ.setdefault("LOG_MF_PATH", os.path.join(folder, "log"))
    os.environ.setdefault("LOCAL_DEFAULT_PATH", folder)
    logging.getLogger(f"mindformers{log}").addFilter(_is_error)
    build_mf_context = import_module("mindformers.core.context.build_context").build_mf_context
    config_class = import_module("mindformers.tools.register").MindFormerConfig
    target = "CPU" if eager else "Ascend"
    build_mf_context(
        config_class(
            use_legacy=False,
            run_mode="predict",
            context={"device_target": target, "mode": 1 if eager else 0},
            parallel={},
            parallel_config={},
        )
    )


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _check(hf_config: Any, context: ModelContext) -> None:
    """SuiteError for what its networks leave out without a word, or cannot do."""
    name = type(hf_config).__name__
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()):
        raise SuiteError(
            f"{name}: mindformers has no sliding-window attention, which layer_types asks for; leave out model_source, "
            "or serve a model without windows."
        )
    if (rope := _rope(hf_config).get("rope_type", "default")) not in ROPE_TYPES:
        raise SuiteError(
            f"{name}: rope type {rope!r} is not served from mindformers ({', '.join(ROPE_TYPES)} are); leave out "
            "model_source."
        )
    if hf_config.hidden_act != "silu":
        raise SuiteError(
            f"{name}: mindformers has no activation but silu, and hidden_act is {hf_config.hidden_act!r}; leave out "
            "model_source."
        )


def _rope(hf_config: Any) -> dict[str, Any]:
    return dict(getattr(hf_config, "rope_parameters", None) or {})


def _options(package: str, hf_config: Any, context: ModelContext) -> dict[str, Any]:
    """What the configuration says, in the spelling of transformers 4, which mindformers reads."""
    options = {key: value for key, value in hf_config.to_dict().items() if key not in DROPPED}
    rope = _rope(hf_config)
    options["rope_theta"] = rope.pop("rope_theta", 10000.0)
    options["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    if rope.get("rope_type", "default") != "default":
        options["rope_scaling"] = rope
    dtype = DTYPES[context.dtype]
    options.update(compute_dtype=dtype, params_dtype=dtype, layernorm_compute_dtype="float32", rotary_dtype=dtype)
    if package == "qwen2":
        options["add_qkv_bias"] = True  # Qwen2 always has it; its config.json does not say so
    return options
