"""What cannot be served from a suite of models (vllm_ms_models/suites), on vLLM's side: one sentence each."""

from collections.abc import Iterator

from vllm.config import VllmConfig

from vllm_ms_models import registry, suites
from vllm_ms_models.bridge import quantization
from vllm_ms_models.checkpoint.errors import CheckpointError


def refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """One sentence for each thing that was asked for and that models of the chosen source cannot do.

    Raises SuiteError for a source that is unknown, not installed, or of a version that does not work here.
    """
    name = suites.source(vllm_config)
    if name == suites.NATIVE:
        known = registry.architectures()  # those of other packages, too
        for architecture in vllm_config.model_config.architectures:
            if architecture in known:
                continue
            for other in suites.ADDED.get(architecture, ()):
                option = f'{{"{suites.OPTION}": "{other}"}}'
                yield f"{architecture} is not among this package's own models; --additional-config '{option}' has one."
        return
    adapter = suites.adapter(name)
    adapter.check()
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    chosen = f"is not supported for models of {name}"
    if model.is_multimodal_model:
        yield f"{model.architecture} reads images, which {chosen}; leave out {suites.OPTION} or serve a text model."
        return
    if model.runner_type == "pooling":
        yield f"--runner pooling {chosen}, which only generate text; leave out {suites.OPTION}."
        return
    suites.check_architecture(name, model.architecture)
    dtype = str(model.dtype).removeprefix("torch.")
    adapter.check_model(model.architecture, model.hf_text_config, dtype, parallel.tensor_parallel_size)
    if vllm_config.lora_config is not None:
        yield f"--enable-lora {chosen}; leave out one of them."
    if _is_quantized(vllm_config):
        yield f"A quantized checkpoint {chosen}; leave out {suites.OPTION}, or serve the model in floats."
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.method != "ngram":
        yield f"--speculative-config with a draft model {chosen}; leave out one of them."
    for flag, size in (
        ("--tensor-parallel-size", 1 if adapter.TENSOR_PARALLEL else parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--data-parallel-size", parallel.data_parallel_size if model.is_moe else 1),
    ):
        if size > 1:
            yield f"{flag} {size} {chosen}; use 1, or leave out {suites.OPTION}."
    if parallel.enable_expert_parallel:
        yield f"--enable-expert-parallel {chosen}; leave out one of them."


def _is_quantized(vllm_config: VllmConfig) -> bool:
    try:
        return quantization.checkpoint_format(vllm_config) is not None
    except CheckpointError:  # quantized in a way that is refused anyway
        return True
