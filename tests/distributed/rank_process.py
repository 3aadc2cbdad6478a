"""What a process that is one rank of a test begins with: `python -m tests.distributed.NAME STORE SIZE RANK`."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import torch
import torch.distributed as dist

from vllm_ms_models import compat
from vllm_ms_models.bridge.ranks import TorchGroup
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.shared_memory import share_memory
from vllm_ms_models.kernels.cpu import CpuKernels

ROOT = Path(__file__).parents[2]


def launch(name: str, size: int, folder: Path) -> list[subprocess.Popen[str]]:
    """All ranks of tests/distributed/NAME.py, with a pipe of what each says; `folder` is where they find each other."""
    command = [sys.executable, "-m", f"tests.distributed.{name}", str(folder / "store"), str(size)]
    return [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(size)
    ]


def start() -> TorchGroup:
    """The group of all processes, by gloo."""
    store, size, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return TorchGroup(rank, size, dist.group.WORLD)


def exchange(value: Any, size: int) -> list[Any]:
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def sharing(general: Group, compiled: bool = True, isa: str | None = None) -> Group:
    """Of the same ranks, through shared memory if all of them say that their kernels are `compiled`."""
    functions = CpuKernels(isa).collectives if compiled else None
    return share_memory(general, "tensor parallel", functions, partial(exchange, size=general.size))
