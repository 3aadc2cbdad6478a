"""The C++ kernels for CPUs: AVX-512 BF16, AVX-512, AVX2 or portable, built with g++ at first use.

`CpuKernels` lives in `backend` (importing it imports MindSpore); `KernelBuildError` says why there are no C++ kernels.
"""

from typing import Any

from vllm_ms_models.kernels.cpu.loader import KernelBuildError

__all__ = ["CpuKernels", "KernelBuildError"]


def __getattr__(name: str) -> Any:
    if name == "CpuKernels":
        from vllm_ms_models.kernels.cpu.backend import CpuKernels

        return CpuKernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
