"""Choice of the kernel back end."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_ms_models.kernels.interface import SCALE_BYTES, Integers, Kernels, Weight
from vllm_ms_models.kernels.low_rank import Addend, LowRank
from vllm_ms_models.kernels.paged_sequences import PagedSequences
from vllm_ms_models.kernels.routing import Routing
from vllm_ms_models.kernels.sampling import Sampling

logger = logging.getLogger("vllm.ms_models")  # a child of vLLM's, so that it shares its handlers

_active: Kernels | None = None


def use(kernels: Kernels) -> None:
    """Make `kernels` the back end of every model built from now on."""
    global _active
    _active = kernels


def get() -> Kernels:
    """The active back end; RuntimeError before `use`."""
    if _active is None:
        raise RuntimeError("No kernels chosen: call vllm_ms_models.kernels.use(...) before building a model.")
    return _active


@contextmanager
def making_uncompiled() -> Iterator[None]:
    """Layers that are made in the block run operator by operator, also where others become graphs."""
    before = get()
    use(before.beside_graphs)
    try:
        yield
    finally:
        use(before)


def choose(device: str, graphs: bool = False) -> Kernels:
    """The best back end for `device` ("cpu", "ascend"), or the one that `VLLM_MS_KERNELS` (auto, cpp, reference) names.

    `graphs` are for Ascend: layers are to be compiled (kernels/ascend/graph).

    Without a working C++ compiler, auto falls back to the reference kernels with a warning.
    """
    wanted = os.environ.get("VLLM_MS_KERNELS", "auto").lower()
    if wanted not in ("auto", "cpp", "reference"):
        raise ValueError(f"VLLM_MS_KERNELS={wanted} is unknown; set it to auto, cpp or reference.")
    if device == "ascend":
        if wanted != "auto":
            raise ValueError(f"VLLM_MS_KERNELS={wanted} is for CPUs; unset it, or set VLLM_MS_DEVICE=cpu.")
        import mindspore as ms

        from vllm_ms_models.kernels.ascend import AscendKernels
        from vllm_ms_models.kernels.ascend.device import check_device

        check_device(ms.hal.get_device_name(0, "Ascend"))  # of the current device, whatever number is given
        if graphs:
            from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels

            return AscendGraphKernels()
        return AscendKernels()
    from vllm_ms_models.kernels.reference import ReferenceKernels

    if wanted == "reference":
        return ReferenceKernels()
    from vllm_ms_models.kernels.cpu import CpuKernels, KernelBuildError

    try:
        return CpuKernels()
    except KernelBuildError as error:
        if wanted == "cpp":
            raise
        logger.warning("%s Serving with the much slower reference kernels instead.", error)
        return ReferenceKernels()


__all__ = [
    "SCALE_BYTES",
    "Addend",
    "Integers",
    "Kernels",
    "LowRank",
    "PagedSequences",
    "Routing",
    "Sampling",
    "Weight",
    "choose",
    "get",
    "making_uncompiled",
    "use",
]
