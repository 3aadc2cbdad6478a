"""vLLM's Ray executor for ranks on CPUs: a rank takes one of a Ray node's CPUs, as others take one of its GPUs."""

import os
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from vllm_ms_models.cores import RAY_RANK

_SET_BY_VLLM = "VLLM_OMP_NUM_THREADS_SET_BY_VLLM"


class RayExecutor(RayExecutorV2):
    """Places each rank in a bundle of one CPU, which is reserved for it; how many CPUs it uses is not Ray's choice."""

    def _build_runtime_env(self) -> dict[str, Any]:
        runtime_env: dict[str, Any] = super()._build_runtime_env()
        given = "" if os.environ.get(_SET_BY_VLLM) == "1" else os.environ.get("OMP_NUM_THREADS", "")
        runtime_env["env_vars"] |= {RAY_RANK: given}
        return runtime_env

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        """None beside the bundle, whose CPU an actor without CPUs of its own may use."""
        return {"num_gpus": 0}
