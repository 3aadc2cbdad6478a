"""vLLM's data parallelism as layers see it."""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from vllm_ms_models.bridge.ranks import data_parallel_group
from vllm_ms_models.distributed.rows import DataParallel


def data_parallel_ranks(vllm_config: VllmConfig) -> DataParallel:
    """Those of a mixture of experts, which run their steps together; vLLM lets other models' go on by themselves."""
    if vllm_config.parallel_config.data_parallel_size == 1:
        return DataParallel()
    return DataParallel(data_parallel_group(vllm_config.parallel_config), _tokens_of_all)


def _tokens_of_all() -> Sequence[int]:
    """How many tokens each data-parallel rank has in this step; 1 of an idle one."""
    metadata = get_forward_context().dp_metadata
    assert metadata is not None
    counts: list[int] = metadata.num_tokens_across_dp_cpu.tolist()
    return counts
