"""MindSpore's own collectives, as far as they can be called without a device."""

import inspect
import os
import subprocess
import sys

from mindspore.mint import distributed

from tests.servers import free_port

ROLES = ({"MS_ROLE": "MS_SCHED"}, {"MS_ROLE": "MS_WORKER"}, {"MS_ROLE": "MS_WORKER"})


def test_device_group() -> None:
    """Two processes and MindSpore's scheduler; device_rank.py compares."""
    common = {"MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.device_rank"],
            env=os.environ | common | role,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for role in ROLES
    ]
    try:
        for process in processes[1:]:
            output, _ = process.communicate(timeout=180)
            assert "all agree" in output, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_calls_that_set_groups_up_fit_their_signatures() -> None:
    """HCCL is not here to take them (bridge/ranks.py)."""
    inspect.signature(distributed.init_process_group).bind(
        "hccl", init_method="tcp://127.0.0.1:1", world_size=2, rank=0
    )
    inspect.signature(distributed.new_group).bind([0, 1])
