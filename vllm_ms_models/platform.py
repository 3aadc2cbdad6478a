"""What vLLM asks of a hardware platform: worker, attention backend, defaults; and what cannot be served is refused.

Imported by every vLLM process, the command line included: no MindSpore here.
"""

import logging
import os
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum

from vllm_ms_models import cores, faults, memory, ports, processes, registry, runtime, suites

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.inputs import EngineInput
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = logging.getLogger("vllm.ms_models")

BLOCK_SIZE = 32  # tokens in a KV cache block, unless --block-size says otherwise

# Read by vLLM's own CPU back end, not by ours.
UNREAD = {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_ATTN_SPLIT_KV"}

# Set by vLLM for its own processes, though not in its list of variables.
INTERNAL = {"VLLM_OMP_NUM_THREADS_SET_BY_VLLM"}

os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # needs Triton


class MindSporePlatform(CpuPlatform):
    """Host tensors are torch's on the CPU; the model runs in MindSpore."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    dist_backend = "gloo"

    @property
    def ray_device_key(self) -> str:
        """A Ray node's CPUs are what ranks are counted by; within a rank, of which vLLM asks the numbers of its devices
        and Ray knows none for CPUs, the GPUs: it has none.
        """
        return "GPU" if cores.RAY_RANK in os.environ else "CPU"

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's own kernels are not needed (and not in its device-less build)."""

    @classmethod
    def verify_model_arch(cls, model_arch: str) -> None:
        if model_arch not in registry.DRAFTS and model_arch not in suites.ADDED:
            registry.check(model_arch)

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuse what cannot be served, then choose worker, load format and block size."""
        if vllm_config.model_config is None:
            return
        runtime.require_mindspore()
        runtime.device()
        from vllm_ms_models.bridge import refusals, stopping
        from vllm_ms_models.bridge.host import RANKS_VARIABLE

        refusals.check(vllm_config)
        _choose(vllm_config)
        for name in UNREAD.intersection(os.environ):
            logger.warning("%s has no effect here; OMP_NUM_THREADS and taskset choose threads and CPUs.", name)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = processes.start_method()
        if processes.is_vllm_command():
            faults.prepare_command()
            stopping.end_requests_with_engine()
            ports.check_ports()
        parallel = vllm_config.parallel_config
        os.environ[RANKS_VARIABLE] = str(parallel.data_parallel_size_local * parallel.local_world_size)

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """`check_and_update_config` chose the default, or refused what was asked for."""

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        return "vllm_ms_models.bridge.attention_backend.MindSporeAttentionBackend"

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm_ms_models.bridge import triton_overrides

        triton_overrides.register()

    @classmethod
    def validate_environ(cls, hard_fail: bool) -> None:
        """As vLLM's, but our own variables are known."""
        from vllm import envs

        known = {*envs.environment_variables, *runtime.ENVIRONMENT, *INTERNAL}
        for name in os.environ:
            if name.startswith("VLLM_") and name not in known:
                message = f"Unknown environment variable {name}; vLLM and vllm-ms-models do not read it."
                if hard_fail:
                    raise ValueError(message)
                logger.warning(message)

    @classmethod
    def validate_request(cls, processed_inputs: "EngineInput", params: "SamplingParams | PoolingParams") -> None:
        from vllm_ms_models.bridge.requests import check_request

        check_request(params)

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return False


def _choose(vllm_config: "VllmConfig") -> None:
    from vllm.config import CompilationMode, CUDAGraphMode

    from vllm_ms_models.bridge import encoder
    from vllm_ms_models.bridge.loader import LOAD_FORMATS
    from vllm_ms_models.bridge.refusals import WORKER

    if vllm_config.model_config.architecture in registry.ENCODERS:
        encoder.limit_length(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    if parallel.worker_cls == "auto":
        parallel.worker_cls = WORKER
    if parallel.distributed_executor_backend == "ray":
        from vllm_ms_models.bridge.ray_executor import RayExecutor

        parallel.distributed_executor_backend = RayExecutor
    vllm_config.load_config.load_format = LOAD_FORMATS[vllm_config.load_config.load_format]
    if not vllm_config.cache_config.user_specified_block_size:
        vllm_config.cache_config.block_size = BLOCK_SIZE
    if vllm_config.cache_config.kv_cache_memory_bytes is None:
        vllm_config.cache_config.kv_cache_memory_bytes = memory.space_from_environment()
    vllm_config.scheduler_config.async_scheduling = False
    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    compilation.cudagraph_capture_sizes = []
