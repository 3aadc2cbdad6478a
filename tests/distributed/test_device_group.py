"""MindSpore's own collectives, as far as they can be called without a device."""

import os
import subprocess
import sys

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
