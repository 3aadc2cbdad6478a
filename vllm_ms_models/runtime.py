"""Starting MindSpore in this process: device, kernels, and the one line that says which."""

import logging
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vllm_ms_models import compat, devices

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
    """`VLLM_MS_DEVICE` (auto, cpu or ascend) resolved to "cpu" or "ascend"; ValueError for what this host cannot do.

    auto is Ascend on a host that has such devices for this process.
    """
    wanted = os.environ.get("VLLM_MS_DEVICE", "auto").lower()
    if wanted not in ("auto", "cpu", "ascend"):
        raise ValueError(f"VLLM_MS_DEVICE={wanted} is not a device; set it to auto, cpu or ascend.")
    if wanted == "cpu":
        return "cpu"
    if devices.visible():
        return "ascend"
    if wanted == "ascend":
        reason = f"{devices.VISIBLE} leaves no" if devices.installed() else "this host has no"
        raise ValueError(
            f"VLLM_MS_DEVICE=ascend: {reason} Ascend device; set VLLM_MS_DEVICE=cpu to serve from the CPU."
        )
    return "cpu"


def start_mindspore(target: str = "", number: int = 0, join: Callable[[], None] | None = None) -> str:
    """Set MindSpore up in this process, without kernels, on `target`, or else `device()`. Returns which.

    `number` is which of a host's Ascend devices. `join` makes this process one of several with a device each: MindSpore
    wants that before its first tensor.
    """
    require_mindspore()
    target = target or device()
    import mindspore as ms

    if target == "ascend":
        ms.set_device("Ascend", number)
        if join is not None:
            join()
        return target
    ms.set_device("CPU")
    ms.runtime.launch_blocking()  # direct kernel calls must never race with queued operators
    compat.restore_thread_limit()
    compat.absorb_numpy_warning()
    return target


def start(
    dtype: str, target: str = "", number: int = 0, join: Callable[[], None] | None = None, graphs: bool = False
) -> None:
    """As `start_mindspore`, and choose the kernels and log one line. `dtype` is only reported."""
    target = start_mindspore(target, number, join)
    import mindspore as ms

    from vllm_ms_models import kernels

    kernels.use(kernels.choose(target, graphs=True) if graphs else kernels.choose(target))
    logger.info("MindSpore %s on %s, kernels: %s, dtype: %s", ms.__version__, target, kernels.get().describe(), dtype)
