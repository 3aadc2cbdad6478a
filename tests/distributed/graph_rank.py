"""One process of test_device_graphs.py: a rank of a model as compiled graphs, whose ranks meet by MindSpore's mccl.

Arguments: what the ranks share ("tensor", or "data": then each has a prompt of its own), architecture, the checkpoint's
folder, where logits are written. MindSpore's environment variables (MS_ROLE and others) say which process this is.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication

from tests.ascend.graph_runs import PROMPTS, loaded, logits_of, logits_of_step
from tests.distributed.device_ranks import join
from vllm_ms_models.distributed.communication import GraphGroup
from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.kernels.ascend import dtypes

IDLE = (1, 1)  # tokens of the ranks, as vLLM counts where one has none


class Ranks(GraphGroup):
    """mccl has no ReduceScatter: here the sum is everyone's first."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.all_reduce(x).reshape(self.size, -1, x.shape[1])[self.rank]


def main(shared: str, architecture: str, folder: str, target: str) -> None:
    if not join():
        return
    dtypes.TAKEN = (ms.float32,)
    own, size = communication.get_rank(), communication.get_group_size()
    group = Ranks(own, size, communication.GlobalComm.WORLD_COMM_GROUP)
    if shared == "tensor":
        found = logits_of([loaded(architecture, folder, tensor_parallel=group, expert_parallel=True)])
    else:
        found = of_own_prompt(group, architecture, folder)
    np.savez(Path(target) / f"{own}.npz", *found)
    print("done", flush=True)


def of_own_prompt(group: Ranks, architecture: str, folder: str) -> list[np.ndarray]:
    """Then the last step of the first rank once more, while the other has no tokens: its layers run uncompiled."""
    ranks = DataParallel(group, lambda: IDLE)
    graphs = loaded(architecture, folder, data_parallel=ranks, expert_parallel=True)
    own = slice(group.rank, group.rank + 1)
    (found,) = logits_of([graphs], own)
    if group.rank == 0:
        before = [len(prompt) - 1 for prompt in PROMPTS]
        again = logits_of_step([graphs], before, IDLE, own)
        assert np.allclose(again, found[-1:], rtol=0, atol=1e-5)  # sums of float32 in another order
    else:
        for _, part in graphs.cell.cells_and_names():
            if hasattr(part, "idle"):
                part.idle(1)
    return [found]


if __name__ == "__main__":
    main(*sys.argv[1:])
