"""Two processes, and MindSpore's scheduler, by which they meet for its collectives on CPUs (mccl)."""

import os
import subprocess
import sys

import mindspore as ms
from mindspore import communication

from tests.servers import free_port
from vllm_ms_models import compat

ROLES = ({"MS_ROLE": "MS_SCHED"}, {"MS_ROLE": "MS_WORKER"}, {"MS_ROLE": "MS_WORKER"})


def run_ranks(module: str, *arguments: str, done: str, seconds: float = 180) -> None:
    """Run it in each; both must say `done`."""
    common = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | common | role,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for role in ROLES
    ]
    try:
        for process in processes[1:]:
            output, _ = process.communicate(timeout=seconds)
            assert done in output, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def join() -> bool:
    """Called first by each of the processes; whether it is one of the ranks, and not the scheduler."""
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    compat.absorb_numpy_warning()
    communication.init("mccl")
    return os.environ["MS_ROLE"] == "MS_WORKER"
