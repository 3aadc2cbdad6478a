"""What the benchmark ran on."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.models import ROOT


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _flags() -> list[str]:
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    found = Path("/proc/cpuinfo").read_text().split()
    return [flag for flag in wanted if flag in found]


def describe() -> dict[str, Any]:
    """CPU, its vector instructions, CPUs that we may use, memory in GiB, kernel, Python."""
    return {
        "cpu": _cpu(),
        "instructions": _flags(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit of this checkout, "+" behind it if files differ; "unknown" outside of git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
