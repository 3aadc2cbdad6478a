"""What this version does not do, refused at start: one sentence each, nothing is ignored in silence."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, VllmConfig

from vllm_ms_models import registry, runtime
from vllm_ms_models.bridge import encoder, lora, quantization, sentence_transformers, speculation, suites
from vllm_ms_models.bridge.loader import LOAD_FORMATS
from vllm_ms_models.checkpoint.errors import CheckpointError
from vllm_ms_models.suites import ADDED

WORKER = "vllm_ms_models.worker.MindSporeWorker"
INT8_CACHE = "int8_per_token_head"  # vLLM's name of it
EXECUTORS = (None, "mp", "uni")  # and Ray's
BLOCK_MULTIPLE = 16  # the CPU kernels keep the positions of a cache block in panels of 16


class RefusalError(ValueError):
    """What was asked for cannot be served. Its text is the first of `sentences`, which are all that is known."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(sentences[0])
        self.sentences = sentences


def check(vllm_config: VllmConfig) -> None:
    """RefusalError, or UnsupportedArchitectureError, if anything was asked for that cannot be served."""
    found = []
    try:
        for sentence in refusals(vllm_config):
            found.append(sentence)  # what was found is kept when a later one raises
    except ValueError as error:
        if not found:
            raise
        found.append(str(error))
    if found:
        raise RefusalError(found)


def refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """One sentence for each thing that was asked for and cannot be served."""
    yield from _loading(vllm_config)
    yield from suites.refusals(vllm_config)
    spec = vllm_config.speculative_config
    if spec is not None:
        yield from speculation.refusals(spec, vllm_config.parallel_config)
        if vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe:
            yield (
                "--speculative-config is not supported with --data-parallel-size for a mixture of experts, whose idle "
                "ranks serve the others; leave out one of them."
            )
        yield from _model(vllm_config, spec.draft_model_config)
    for architecture in vllm_config.model_config.architectures:
        if architecture not in ADDED:
            registry.check(registry.unconverted(architecture))
    yield from _model(vllm_config, vllm_config.model_config)
    if runtime.device() == "ascend":
        yield from _ascend(vllm_config.model_config)
    yield from _ranks(vllm_config)
    yield from lora.refusals(vllm_config)
    for flag, size in _sizes(vllm_config):
        if size > 1:
            yield f"{flag} {size} is not supported yet; use 1."
    for flag, value in _flags(vllm_config):
        if value:
            yield f"{flag} is not supported yet; leave it out."


def _loading(vllm_config: VllmConfig) -> Iterator[str]:
    cache, load = vllm_config.cache_config, vllm_config.load_config
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "mindspore_models" not in plugins.split(","):
        yield f"VLLM_PLUGINS={plugins} leaves out mindspore_models, which registers the models; add it."
    if cache.block_size % BLOCK_MULTIPLE:
        yield f"--block-size {cache.block_size} is not supported: use a multiple of {BLOCK_MULTIPLE}, or leave it out."
    if load.load_format not in LOAD_FORMATS:
        yield (
            f"--load-format {load.load_format} is not supported: weights are read from safetensors; "
            f"use auto, safetensors or dummy."
        )
    if problem := quantization.option_problem(vllm_config):
        yield problem


def _model(vllm_config: VllmConfig, model: ModelConfig) -> Iterator[str]:
    """Of the model, or of a draft."""
    cache = vllm_config.cache_config
    if model.model_impl not in ("auto", "vllm"):
        yield f"--model-impl {model.model_impl} runs a torch model; leave it at auto to use MindSpore's."
    if model.runner_type == "pooling":
        yield from _pooling(vllm_config, model)
    yield from _multimodal(vllm_config, model)
    yield from _quantization(vllm_config, model)
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."), INT8_CACHE):
        yield (
            f"--kv-cache-dtype {cache.cache_dtype} is not supported: the cache has the model's dtype "
            f"({model.dtype}) or int8; use --kv-cache-dtype auto or {INT8_CACHE}."
        )
    if cache.cache_dtype == INT8_CACHE and model.is_deepseek_mla:
        yield (
            f"--kv-cache-dtype {INT8_CACHE} is not supported for multi-head latent attention, whose cache is small "
            "already; use --kv-cache-dtype auto."
        )


def _ascend(model: ModelConfig) -> Iterator[str]:
    """What the CPU does and Ascend's fused operators, or this package with them, do not."""
    if model.dtype == torch.float32:
        yield (
            "float32 is not supported on Ascend, whose fused operators take 16-bit floats; use --dtype bfloat16, or "
            "set VLLM_MS_DEVICE=cpu."
        )


def _multimodal(vllm_config: VllmConfig, model: ModelConfig) -> Iterator[str]:
    """Models that read images or video, and what was asked of a model because of its positions."""
    architecture = model.architectures[0]
    if not model.is_multimodal_model:
        if model.uses_mrope:
            yield (
                f"mrope_section in config.json is not supported for {architecture}, which reads text only; remove it, "
                "its positions are those of text."
            )
        return
    runtime.require_torchvision()
    settings = model.multimodal_config
    if model.runner_type == "pooling":
        yield f"--runner pooling is not supported for {architecture}, which reads images; serve a text model."
    if vllm_config.lora_config is not None:
        yield f"--enable-lora is not supported for {architecture}, which reads images; leave it out."
    if vllm_config.speculative_config is not None:
        yield f"--speculative-config is not supported for {architecture}, which reads images; leave it out."
    if settings.mm_encoder_tp_mode != "weights":
        yield f"--mm-encoder-tp-mode {settings.mm_encoder_tp_mode} is not supported yet; leave it out."
    for flag, value in (
        ("--enable-mm-embeds", settings.enable_mm_embeds),
        ("--mm-encoder-only", settings.mm_encoder_only),
        ("--mm-encoder-attn-backend", settings.mm_encoder_attn_backend),
        ("--mm-encoder-attn-dtype", settings.mm_encoder_attn_dtype),
        ("--video-pruning-rate", settings.video_pruning_rate),
    ):
        if value:
            yield f"{flag} is not supported yet; leave it out."


def _pooling(vllm_config: VllmConfig, model: ModelConfig) -> Iterator[str]:
    """vLLM switches off by itself what would leave out tokens, and warns if it was asked for."""
    assert model.pooler_config is not None
    if vllm_config.speculative_config is not None:
        yield "--speculative-config is not possible with --runner pooling, which generates no tokens; leave it out."
    yield from sentence_transformers.refusals(model)
    if model.architecture in registry.ENCODERS:
        yield from encoder.refusals(vllm_config)
    kinds = f"{model.pooler_config.seq_pooling_type} and {model.pooler_config.tok_pooling_type} pooling"
    if model.attn_type == "encoder_only":
        kinds = "attention in both directions"
    if vllm_config.scheduler_config.enable_chunked_prefill and not model.is_chunked_prefill_supported:
        yield f"--enable-chunked-prefill is not possible with {kinds}, which takes whole prompts; leave it out."
    if vllm_config.cache_config.enable_prefix_caching and not model.is_prefix_caching_supported:
        yield f"--enable-prefix-caching is not possible with {kinds}, which takes whole prompts; leave it out."


def _quantization(vllm_config: VllmConfig, model: ModelConfig) -> Iterator[str]:
    asked = model.quantization
    try:
        format = quantization.checkpoint_format(vllm_config, model)
    except CheckpointError as error:
        yield str(error)
        return
    if format is None:
        if asked is not None:
            yield (
                f"--quantization {asked} is not possible: the checkpoint is not quantized, and weights are not "
                "quantized while they are loaded; leave it out, or serve a quantized checkpoint."
            )
    elif asked not in (None, *quantization.NAMES[format.name]):
        yield (
            f"--quantization {asked} does not belong to this checkpoint, which is in the format {format.name}; "
            "leave it out: the format is recognised."
        )
    if model.quantization_config is not None:
        yield "--quantization-config is not supported: the checkpoint alone says how it is quantized; leave it out."


def _ranks(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1 and parallel.distributed_executor_backend == "uni":
        yield (
            f"--distributed-executor-backend uni has one process, which cannot be "
            f"{parallel.world_size} ranks; use mp, or leave it out."
        )
    if parallel.nnodes > 1 and parallel.data_parallel_size > 1:
        yield (
            f"--nnodes {parallel.nnodes} is not supported with --data-parallel-size; "
            "start the data-parallel ranks of other hosts with --headless instead."
        )
    if parallel.use_ray:
        yield from _ray(parallel)
    yield from _stages(parallel.pipeline_parallel_size, vllm_config.model_config.hf_text_config.num_hidden_layers)


def _ray(parallel: ParallelConfig) -> Iterator[str]:
    if not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        yield "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 chooses a Ray executor that has no ranks on CPUs; unset it."
    if parallel.data_parallel_size > 1:
        yield (
            "--distributed-executor-backend ray is not supported with --data-parallel-size; "
            "start the data-parallel ranks of other hosts with --headless instead."
        )


def _stages(stages: int, layers: int) -> Iterator[str]:
    """Of a pipeline: each stage must have a layer."""
    if stages > layers:
        yield f"--pipeline-parallel-size {stages} is more than the model's {layers} layers; use {layers} at most."
    given = envs.VLLM_PP_LAYER_PARTITION
    if stages > 1 and given is not None:
        numbers = [int(number) if number.strip().isdecimal() else 0 for number in given.split(",")]
        if len(numbers) != stages or sum(numbers) != layers or min(numbers) < 1:
            yield (
                f"VLLM_PP_LAYER_PARTITION={given} does not give each of {stages} stages a number of layers above 0, "
                f"{layers} in all; correct or unset it."
            )


def _sizes(vllm_config: VllmConfig) -> Iterator[tuple[str, int]]:
    parallel = vllm_config.parallel_config
    yield "--decode-context-parallel-size", parallel.decode_context_parallel_size
    yield "--prefill-context-parallel-size", parallel.prefill_context_parallel_size


def _flags(vllm_config: VllmConfig) -> Iterator[tuple[str, Any]]:
    """A flag and a value that is true if it was used."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, load, offload = vllm_config.cache_config, vllm_config.load_config, vllm_config.offload_config
    executor = parallel.distributed_executor_backend
    yield "--kv-transfer-config", vllm_config.kv_transfer_config
    yield "--kv-offloading-size", cache.kv_offloading_size
    yield "--kv-cache-dtype-skip-layers", cache.kv_cache_dtype_skip_layers
    yield "--ec-transfer-config", vllm_config.ec_transfer_config
    yield "--weight-transfer-config", vllm_config.weight_transfer_config
    yield "--enable-sleep-mode", model.enable_sleep_mode
    yield "--enable-prompt-embeds", model.enable_prompt_embeds
    yield "--model-class-overrides", model.model_class_overrides
    yield "--enable-dbo", parallel.enable_dbo
    yield "--enable-eplb", parallel.enable_eplb
    yield f"--data-parallel-backend {parallel.data_parallel_backend}", parallel.data_parallel_backend != "mp"
    yield "--enable-elastic-ep", parallel.enable_elastic_ep
    yield f"--all2all-backend {parallel.all2all_backend}", parallel.all2all_backend != "allgather_reducescatter"
    placement = parallel.expert_placement_strategy
    yield f"--expert-placement-strategy {placement}", placement != "linear"
    yield f"--distributed-executor-backend {executor}", not (executor in EXECUTORS or parallel.use_ray)
    yield f"--worker-cls {parallel.worker_cls}", parallel.worker_cls not in ("auto", WORKER)
    yield "--attention-backend", vllm_config.attention_config.backend
    yield "--cpu-offload-gb", offload.uva.cpu_offload_gb
    yield "--offload-group-size", offload.prefetch.offload_group_size
    yield "--model-loader-extra-config", load.model_loader_extra_config
    yield "--safetensors-load-strategy", load.safetensors_load_strategy
    yield "--pt-load-map-location", load.pt_load_map_location != "cpu"
