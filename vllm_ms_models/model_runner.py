"""The model runner: vLLM's own for CPUs, with a quicker greedy choice, drafts verified by sampling and our adapters.

Batching, chunked prefill, prefix caching, sampling, log-probabilities, structured output and the drafting of tokens are
all inherited; the model that it drives is a shell round a MindSpore Cell (`bridge/model.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_ms_models.bridge.attention_backend import add_uncached_group
from vllm_ms_models.bridge.lora import AdapterManager
from vllm_ms_models.bridge.model import CausalLMShell
from vllm_ms_models.bridge.sampler import MindSporeSampler
from vllm_ms_models.bridge.speculation import check_cache
from vllm_ms_models.bridge.verification import MatchingSampler


class MindSporeModelRunner(CPUModelRunner):
    """Little but the samplers and the adapters is overridden: keep it so."""

    _draft_token_ids: list[list[int]] | torch.Tensor | None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        config = self.model_config
        self.sampler: MindSporeSampler = MindSporeSampler(config.logprobs_mode, config.use_fp64_gumbel)
        if hasattr(self, "rejection_sampler"):
            self.rejection_sampler: MatchingSampler = MatchingSampler(self.sampler, self.speculative_config, device)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *arguments: Any, **options: Any) -> None:
        """As vLLM's, for a draft model that it can keep apart from the model."""
        if self.speculative_config is not None and self.speculative_config.uses_draft_kv_cache():
            check_cache(self.speculative_config, self.drafter._draft_attn_layer_names, kv_cache_config)
        super().initialize_kv_cache(kv_cache_config, *arguments, **options)

    def may_add_encoder_only_layers_to_kv_cache_config(self) -> None:
        """As vLLM's for its own layers."""
        super().may_add_encoder_only_layers_to_kv_cache_config()
        add_uncached_group(self.vllm_config, self.kv_cache_config)

    def load_lora_model(self, model: CausalLMShell, vllm_config: VllmConfig, device: torch.device) -> CausalLMShell:
        """Adapters are kept beside the model's linear layers; vLLM's own manager would replace torch modules."""
        self.lora_manager = AdapterManager(vllm_config.lora_config, model)
        return model

    def set_active_loras(
        self, input_batch: InputBatch, num_scheduled_tokens: np.ndarray, *arguments: Any, **options: Any
    ) -> None:
        numbers = input_batch.request_lora_mapping[: input_batch.num_reqs]
        requests = input_batch.lora_id_to_lora_request.values()
        self.lora_manager.activate(requests, numbers, num_scheduled_tokens)

    @contextmanager
    def maybe_dummy_run_with_lora(self, *arguments: Any, **options: Any) -> Iterator[None]:
        """A run of an idle rank: nothing is warmed up here, and no adapter of a request is dropped for it."""
        if self.lora_config is not None:
            self.lora_manager.deactivate()
        yield

    def sync_and_gather_intermediate_tensors(
        self, num_tokens: int, intermediate_tensors: IntermediateTensors | None, sync_self: bool
    ) -> IntermediateTensors:
        """What the stage before sent, as it is; vLLM copies it to where CUDA graphs read, which is made in warm-up."""
        if intermediate_tensors is not None:
            return intermediate_tensors
        return super().sync_and_gather_intermediate_tensors(num_tokens, None, sync_self)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """As vLLM's, but generators of requests that are still reading their prompt are out of its reach.

        vLLM samples for them too, drops the token and turns the generator back, which torch's on CPUs refuse.
        """
        generators = self.input_batch.generators
        reading = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs]).tolist()
        kept = {i: generators.pop(i) for i in reading if i in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(kept)

    def _copy_draft_token_ids_to_cpu(self, scheduler_output: SchedulerOutput, zeros_only: bool = False) -> None:
        """Drafts are on the CPU already; vLLM's copy goes through a CUDA stream unless they are a list."""
        if isinstance(self._draft_token_ids, torch.Tensor):
            self._draft_token_ids = self._draft_token_ids.tolist()
        super()._copy_draft_token_ids_to_cpu(scheduler_output, zeros_only)
