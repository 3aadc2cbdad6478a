"""One process of test_device_group.py, whose part is in MindSpore's environment variables (MS_ROLE and others).

MindSpore's collectives for CPUs (mccl) have two of those that HCCL has. A call of the others is well-formed if it is
only their kernel that is missing.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication

from tests.distributed.device_ranks import join
from vllm_ms_models.distributed.communication import DeviceGroup

MISSING = {
    "all_gather": "DistCommAllGatherIntoTensor",
    "reduce_scatter": "DistCommReduceScatterTensor",
    "all_to_all": "DistCommAllToAllVSingle",
}


def main() -> None:
    if not join():
        return
    group = DeviceGroup(communication.get_rank(), communication.get_group_size())
    mine, other = (np.arange(12, dtype=np.float32).reshape(4, 3) + 10 * rank for rank in (group.rank, 1 - group.rank))
    for dtype in (ms.float32, ms.bfloat16):
        x = Tensor(mine).astype(dtype)
        assert np.array_equal(group.all_reduce(x.copy()).astype(ms.float32).asnumpy(), mine + other)
        for collective, kernel in MISSING.items():
            try:
                getattr(group, collective)(x)
            except RuntimeError as error:
                assert f"The kernel {kernel} unregistered" in str(error), error
            else:
                raise AssertionError(f"{collective} ran: compare its result, too")
    x = Tensor(mine)
    first = mine if group.rank == 0 else other
    assert np.array_equal(group.broadcast(x).asnumpy(), first)
    print("all agree", flush=True)


if __name__ == "__main__":
    main()
