"""`python -m vllm_ms_models.kernels.cpu` builds the CPU kernels, if that is still to be done, and describes them."""

import logging
import sys

from vllm_ms_models.kernels.cpu.loader import KernelBuildError, library


def main() -> int:
    """Build; 0, or 1 with the reason on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        path = library()
        from vllm_ms_models.kernels.cpu.backend import CpuKernels

        print(f"{CpuKernels().describe()}: {path}")
    except (KernelBuildError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
