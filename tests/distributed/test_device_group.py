"""MindSpore's own collectives, as far as they can be called without a device."""

import inspect

from mindspore.mint import distributed

from tests.distributed.device_ranks import run_ranks


def test_device_group() -> None:
    """device_rank.py compares."""
    run_ranks("tests.distributed.device_rank", done="all agree")


def test_the_calls_that_set_groups_up_fit_their_signatures() -> None:
    """HCCL is not here to take them (bridge/ranks.py)."""
    inspect.signature(distributed.init_process_group).bind(
        "hccl", init_method="tcp://127.0.0.1:1", world_size=2, rank=0
    )
    inspect.signature(distributed.new_group).bind([0, 1])
