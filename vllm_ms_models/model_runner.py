"""The model runner: vLLM's own for CPUs, with a quicker greedy choice.

Batching, chunked prefill, prefix caching, sampling, log-probabilities and structured output are all inherited; the
model that it drives is a shell round a MindSpore Cell (`bridge/model.py`).
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ms_models.bridge.sampler import MindSporeSampler


class MindSporeModelRunner(CPUModelRunner):
    """Nothing but the sampler is overridden: keep it so."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = self.model_config
        self.sampler: MindSporeSampler = MindSporeSampler(config.logprobs_mode, config.use_fp64_gumbel)
        if hasattr(self, "rejection_sampler"):
            self.rejection_sampler.sampler = self.sampler
