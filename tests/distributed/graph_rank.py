"""One process of test_device_graphs.py: a rank of a model as compiled graphs, whose ranks meet by MindSpore's mccl.

Arguments: architecture, the checkpoint's folder, where rank 0 writes its logits. MindSpore's environment variables
(MS_ROLE and others) say which process this is.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import communication

from tests.ascend.graph_runs import loaded, logits_of
from tests.distributed.device_ranks import join
from vllm_ms_models.distributed.communication import GraphGroup
from vllm_ms_models.kernels.ascend import dtypes


def main(architecture: str, folder: str, target: str) -> None:
    if not join():
        return
    dtypes.TAKEN = (ms.float32,)
    own, size = communication.get_rank(), communication.get_group_size()
    group = GraphGroup(own, size, communication.GlobalComm.WORLD_COMM_GROUP)
    found = logits_of([loaded(architecture, folder, tensor_parallel=group, expert_parallel=True)])
    if own == 0:
        np.savez(Path(target), *found)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
