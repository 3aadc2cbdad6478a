"""The machine's own limits: memory read bandwidth and dot-product peaks, measured by `limits.cpp`."""

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cpp")


@cache
def _program() -> str:
    target = Path(tempfile.mkdtemp(prefix="vllm_ms_models_limits_")) / "limits"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", "-o", str(target), str(SOURCE)], check=True)
    return str(target)


def measure(threads: int | None = None) -> dict[str, float]:
    """read_gb_s, bf16_gflop_s, int8_gop_s and f32_gflop_s with `threads` threads (default: all CPUs we may use).

    Takes about two seconds. Machines drift: measure before and after what is to be judged.
    """
    threads = threads or len(os.sched_getaffinity(0))
    done = subprocess.run([_program(), str(threads)], check=True, capture_output=True, text=True)
    limits: dict[str, float] = json.loads(done.stdout)
    return limits


if __name__ == "__main__":
    print(json.dumps(measure()))
