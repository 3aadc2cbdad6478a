"""LLMs written natively in MindSpore, served by unmodified vLLM.

This module is imported by every vLLM process, the command line included: it must not import MindSpore or torch.
"""

__version__ = "0.1.0"


def register_platform() -> str | None:
    """Entry point `vllm.platform_plugins`: the path of the platform class. Called in every process of vLLM."""
    from vllm_ms_models import faults
    from vllm_ms_models.bridge import stopping

    faults.end_with_parent()
    stopping.end_requests_with_engine()
    return "vllm_ms_models.platform.MindSporePlatform"


def register_models() -> None:
    """Entry point `vllm.general_plugins`: makes our architectures and loaders known to vLLM in this process."""
    from vllm_ms_models.bridge import plugin

    plugin.register()
