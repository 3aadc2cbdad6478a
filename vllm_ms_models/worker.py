"""The worker: one process (or the engine's own) that holds a model and runs its steps."""

import gc
import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NoReturn

import psutil
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_ms_models import cores, devices, memory, runtime
from vllm_ms_models.bridge import ranks
from vllm_ms_models.bridge.agreement import check_software
from vllm_ms_models.bridge.cache_memory import CacheMemory
from vllm_ms_models.bridge.host import host_memory, place
from vllm_ms_models.bridge.lifeline import end_with_first_rank
from vllm_ms_models.model_runner import MindSporeModelRunner

logger = logging.getLogger("vllm.ms_models")


def sequence_bytes(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> tuple[int, int]:
    """Cache bytes of one sequence of maximal length, and of one block, of which vLLM keeps one for itself.

    vLLM's own sums: layers of different kinds are grouped and padded.
    """
    groups = kv_cache_utils.get_kv_cache_groups(vllm_config, dict(specs))
    sequence = kv_cache_utils._max_memory_usage_bytes_from_groups(vllm_config, groups)
    return sequence, kv_cache_utils._pool_bytes_per_block(vllm_config, groups)


def cache_bytes(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], host: memory.HostMemory, resident: int, ranks_here: int
) -> int:
    """What the KV cache of one of `ranks_here` ranks on this host gets, once their weights have been loaded.

    `resident` is what its process holds already. InsufficientMemoryError if one sequence does not fit.
    """
    one_sequence, block = sequence_bytes(vllm_config, specs)
    fit_length = vllm_config.model_config.original_max_model_len == -1  # vLLM chooses the length that fits
    return memory.cache_size(
        host,
        vllm_config.cache_config.gpu_memory_utilization,
        resident,
        block if fit_length else one_sequence + block,
        one_sequence * vllm_config.scheduler_config.max_num_seqs + block,
        vllm_config.cache_config.kv_cache_memory_bytes,
        ranks_here,
    )


class MindSporeWorker(Worker):
    """Overrides what vLLM's GPU worker does with CUDA; everything else is inherited."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, current_platform.dist_backend
        )
        end_with_first_rank(self.parallel_config)
        check_software(self.vllm_config)
        number, self.ranks_here = place(self.parallel_config)
        if self.ranks_here > 1:
            cpus = cores.bind(number, self.ranks_here)  # before any thread of the kernels starts
            logger.info("Rank %d of %d here runs on the CPUs %s.", number, self.ranks_here, ", ".join(map(str, cpus)))
        cores.restore_thread_limit()
        target = runtime.device()
        if target == "ascend":
            devices.check(number, self.ranks_here)
        join = partial(ranks.join_devices, self.distributed_init_method)
        graphs = target == "ascend" and self._compiles()
        runtime.start(str(self.model_config.dtype).removeprefix("torch."), target, number, join, graphs)
        gc.freeze()  # collections while loading need not visit all that was imported: they took a third of the load
        set_random_seed(self.model_config.seed)
        self._init_workspace_and_model_runner()

    def _compiles(self) -> bool:
        """Whether the model runs as compiled graphs; says why not."""
        from vllm_ms_models.bridge.compiling import problem

        reason = problem(self.vllm_config)
        if reason is not None:
            logger.info("The model runs operator by operator: %s.", reason)
        return reason is None

    def _make_model_runner(self) -> MindSporeModelRunner:
        return MindSporeModelRunner(self.vllm_config, self.device)

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        """Sleep-mode pools are for CUDA; the cache's memory is ours."""
        from vllm_ms_models import kernels

        return CacheMemory(kernels.get().own_memory) if tag == "kv_cache" else nullcontext()

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache; there is nothing to profile, the kernels' working space is small and bounded."""
        from vllm_ms_models import kernels

        if kernels.get().own_memory:
            return self._determine_device_memory()
        host = host_memory()
        if self.vllm_config.lora_config is not None:  # adapters come later
            adapters = self.ranks_here * self.model_runner.lora_manager.most_bytes
            host = memory.HostMemory(host.total, max(0, host.available - adapters))
        resident = psutil.Process().memory_info().rss
        specs = self.model_runner.get_kv_cache_spec()
        size = cache_bytes(self.vllm_config, specs, host, resident, self.ranks_here)
        self.available_kv_cache_memory_bytes = size
        return size

    def _determine_device_memory(self) -> int:
        """As `determine_available_memory`, of a device's own memory."""
        from vllm_ms_models import kernels

        device = memory.HostMemory(*kernels.get().memory())
        cache = self.vllm_config.cache_config
        sequence, block = sequence_bytes(self.vllm_config, self.model_runner.get_kv_cache_spec())
        fit_length = self.model_config.original_max_model_len == -1  # vLLM chooses the length that fits
        least = block if fit_length else sequence + block
        reserve = memory.ENCODER_RESERVE if self.model_config.supports_multimodal_inputs else memory.RESERVE
        given = cache.gpu_memory_utilization, least, cache.kv_cache_memory_bytes
        size = memory.device_cache_size(device, *given, reserve)
        self.available_kv_cache_memory_bytes = size
        return size

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Graphs, if the model is compiled; then the seed is reset as vLLM does after its warm-up."""
        from vllm_ms_models import kernels

        seconds = 0.0
        if kernels.get().compiled:
            from vllm_ms_models.bridge.warm_up import compile_graphs

            groups = [group.layer_names for group in self.model_runner.kv_cache_config.kv_cache_groups]
            sizes = self.vllm_config.cache_config.block_size, self.model_config.max_model_len
            seconds = compile_graphs(self.model_runner.model.run, groups, *sizes)
            logger.info("Compiled the model in %.1f s.", seconds)
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        freeze_gc_heap()
        return CompilationTimes(language_model=seconds, encoder=0.0)

    def profile(self, is_start: bool = True, profile_prefix: str | None = None, **bounds: int | None) -> None:
        super().profile(is_start, profile_prefix, **bounds)
        self._record_kernels()

    def annotate_profile(self, scheduler_output: SchedulerOutput) -> AbstractContextManager[Any]:
        """Of one step; with bounds on the steps that it records, this is where vLLM's profiler starts and stops."""
        annotation = super().annotate_profile(scheduler_output)
        if self.profiler is not None:
            self._record_kernels()
        return annotation

    def _record_kernels(self) -> None:
        """In vLLM's traces, while it records any."""
        from vllm_ms_models import kernels
        from vllm_ms_models.bridge.profiling import set_recording

        running = self.profiler is not None and self.profiler.is_running
        for active in {kernels.get(), kernels.get().beside_graphs}:
            set_recording(active, running, self.profiler_config.torch_profiler_record_shapes)

    def sleep(self, level: int = 1) -> NoReturn:
        raise NotImplementedError("Sleep mode needs a device with memory of its own; stop the server instead.")

    def wake_up(self, tags: list[str] | None = None) -> NoReturn:
        raise NotImplementedError("Sleep mode needs a device with memory of its own; stop the server instead.")
