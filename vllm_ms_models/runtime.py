"""Starting MindSpore in this process: device, kernels, and the one line that says which."""

import logging
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from vllm_ms_models import compat

MINDSPORE_VERSION = "2.10.0"

# Every environment variable that this package reads.
ENVIRONMENT = (
    "VLLM_MS_CACHE_DIR",  # where compiled kernels are kept (default: ~/.cache/vllm_ms_models)
    "VLLM_MS_DEVICE",  # auto, cpu or ascend
    "VLLM_MS_ISA",  # avx512_bf16, avx512_vnni, avx512, avx2 or portable (default: the best that this CPU has)
    "VLLM_MS_KERNELS",  # auto, cpp or reference
)

logger = logging.getLogger("vllm.ms_models")  # a child of vLLM's, so that it shares its handlers


def require_mindspore() -> None:
    """ImportError in one sentence unless the MindSpore we are made for is installed (it is not imported)."""
    try:
        found = version("mindspore")
    except PackageNotFoundError:
        raise ImportError(
            f"MindSpore is not installed in this environment; run `pip install mindspore=={MINDSPORE_VERSION}`."
        ) from None
    if found != MINDSPORE_VERSION:
        raise ImportError(
            f"MindSpore {found} is installed but vllm-ms-models is made for {MINDSPORE_VERSION}; "
            f"run `pip install mindspore=={MINDSPORE_VERSION}`."
        )


def require_torchvision() -> None:
    """ImportError in one sentence without torchvision, which vLLM's and transformers' code for images needs."""
    if find_spec("torchvision") is None:
        raise ImportError(
            "torchvision, with which images and video are prepared, is not installed in this environment; run "
            "`pip install 'vllm-ms-models[vision]'`."
        )


def device() -> str:
    """`VLLM_MS_DEVICE` (auto, cpu or ascend) resolved to "cpu"; ValueError for what this host cannot do."""
    wanted = os.environ.get("VLLM_MS_DEVICE", "auto").lower()
    if wanted not in ("auto", "cpu", "ascend"):
        raise ValueError(f"VLLM_MS_DEVICE={wanted} is not a device; set it to auto, cpu or ascend.")
    if wanted == "ascend":
        present = any(Path("/dev").glob("davinci[0-9]*"))
        raise ValueError(
            "VLLM_MS_DEVICE=ascend: "
            + ("the Ascend back end is not part of this version" if present else "this host has no Ascend device")
            + "; set VLLM_MS_DEVICE=cpu to serve from the CPU."
        )
    return "cpu"


def start_mindspore() -> str:
    """Set MindSpore up in this process, without kernels. Returns the device."""
    require_mindspore()
    target = device()
    import mindspore as ms

    ms.set_device(target.upper())
    ms.runtime.launch_blocking()  # direct kernel calls must never race with queued operators
    compat.restore_thread_limit()
    compat.absorb_numpy_warning()
    return target


def start(dtype: str) -> None:
    """Set MindSpore up in this process, choose the kernels and log one line. `dtype` is only reported."""
    target = start_mindspore()
    import mindspore as ms

    from vllm_ms_models import kernels

    kernels.use(kernels.choose(target))
    logger.info("MindSpore %s on %s, kernels: %s, dtype: %s", ms.__version__, target, kernels.get().describe(), dtype)
