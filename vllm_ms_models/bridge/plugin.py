"""What is registered with vLLM in each of its processes: architectures and load formats. Imports no MindSpore."""

import os
from importlib import import_module

from transformers import AutoConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform

from vllm_ms_models import compat, registry, suites


def register() -> None:
    """Entry point of the general plugin."""
    from vllm_ms_models.platform import MindSporePlatform

    if not isinstance(current_platform, MindSporePlatform):
        device = os.environ.get("VLLM_TARGET_DEVICE")
        reason = f"VLLM_TARGET_DEVICE={device} makes it ignore plugins, unset it" if device else "another one is active"
        raise RuntimeError(
            f"vLLM did not choose the platform plugin of vllm-ms-models: {reason}; "
            f"or, to run without it, set VLLM_PLUGINS to the plugins that you want."
        )
    compat.make_accelerator_calls_harmless()
    from vllm_ms_models.bridge import quantization
    from vllm_ms_models.bridge.draft import draft_shell
    from vllm_ms_models.bridge.encoder import encoder_shell
    from vllm_ms_models.bridge.loader import DummyLoader, SafetensorsLoader
    from vllm_ms_models.bridge.model import shell
    from vllm_ms_models.bridge.multimodal import multimodal_shell

    ours = sorted({*registry.architectures(), *suites.ADDED})
    for architecture in ours:
        if architecture in registry.ENCODERS:
            model: type = encoder_shell(architecture)
        elif architecture in registry.MULTIMODAL:
            model = multimodal_shell(architecture)
        else:
            model = shell(architecture)
        ModelRegistry.register_model(architecture, model)
    for architecture in registry.DRAFTS:
        ModelRegistry.register_model(architecture, draft_shell(architecture))
    compat.complete_xlm_roberta_config()
    compat.hide_torch_models([*ours, *registry.DRAFTS])
    register_model_loader("mindspore")(SafetensorsLoader)
    register_model_loader("mindspore_dummy")(DummyLoader)
    quantization.register()
    register_configs()


def register_configs() -> None:
    """Let transformers, which vLLM asks, read the config.json of models that it does not have."""
    for model_type, path in registry.CONFIGS.items():
        module, _, name = path.partition(":")
        AutoConfig.register(model_type, getattr(import_module(module), name), exist_ok=True)
