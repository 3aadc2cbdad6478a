"""Whether vLLM would load a model here: its own configuration, and the model's slots against the files' headers.

Nothing is decided here: the sentences and the sums are those of the platform, the loader and the worker.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.worker.utils import customize_attention_spec

from vllm_ms_models import kernels, memory, registry, runtime, suites
from vllm_ms_models.bridge.attention_backend import MindSporeAttentionBackend
from vllm_ms_models.bridge.context import unnamed_prefix
from vllm_ms_models.bridge.host import host_memory
from vllm_ms_models.bridge.loader import as_wanted, weight_bytes
from vllm_ms_models.bridge.quantization import checkpoint_format
from vllm_ms_models.bridge.ranks import Place, planning
from vllm_ms_models.bridge.refusals import RefusalError
from vllm_ms_models.checkpoint import Checkpoint, check
from vllm_ms_models.cli.doctor.headers import open_headers
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.quantization.schemes import describe
from vllm_ms_models.worker import cache_bytes


@dataclass
class Verdict:
    """What is known of a model; None where that was not reached. Bytes, and sentences of everything refused."""

    model: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    architecture: str | None = None
    implementation: str | None = None
    quantization: str | None = None
    schemes: dict[str, int] = field(default_factory=dict)
    dtype: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    ranks: int | None = None
    weight_bytes: list[int] = field(default_factory=list)
    kv_bytes_per_token: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None

    @property
    def loads(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"loads": self.loads, **asdict(self)}


def examine(model: str, options: list[str]) -> Verdict:
    """`options` are those of `vllm serve`, which exits with 2 for what it does not know."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-ms doctor MODEL"))
    return verdict(AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *options])))


def verdict(arguments: AsyncEngineArgs) -> Verdict:
    """What an engine with `arguments` would do."""
    found = Verdict(arguments.model)
    try:
        vllm_config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # vLLM's own, pydantic's, transformers', the Hub's
        found.problems += sentences(error)
        return found
    _describe(found, vllm_config)
    weights = None
    try:
        if vllm_config.load_config.load_format != "mindspore_dummy":
            weights = open_headers(vllm_config.model_config, vllm_config.load_config)
        _plan(found, vllm_config, weights)
    except Exception as error:  # as above; models raise in their constructors
        found.problems += [sentence for sentence in sentences(error) if sentence not in found.problems]
    return found


def sentences(error: BaseException) -> list[str]:
    """What an exception says, without what pydantic writes round it."""
    if isinstance(error, RefusalError):
        return error.sentences
    details = error.errors() if hasattr(error, "errors") and callable(error.errors) else []
    found: list[str] = []
    for detail in details:
        cause = detail.get("ctx", {}).get("error")
        where = ".".join(map(str, detail["loc"]))
        found += sentences(cause) if isinstance(cause, Exception) else [f"{where}: {detail['msg']}"]
    return found or [str(error).strip() or repr(error)]


def _describe(found: Verdict, vllm_config: VllmConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    found.architecture = model.architectures[0]
    found.implementation = suites.source(vllm_config)
    if found.implementation == suites.NATIVE:
        implementation = registry.lookup(registry.unconverted(found.architecture))
        found.implementation = f"{implementation.__module__}.{implementation.__qualname__}"
    found.dtype = str(model.dtype).removeprefix("torch.")
    found.max_model_len = model.max_model_len
    found.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    found.ranks = parallel.world_size * parallel.data_parallel_size
    if vllm_config.speculative_config is not None:
        found.notes.append("Weights and cache of the draft model are not counted.")
    if vllm_config.lora_config is not None:
        found.notes.append("Memory for adapters is not counted.")
    if parallel.nnodes > 1 or parallel.data_parallel_size_local != parallel.data_parallel_size:
        found.notes.append("Ranks of other hosts are counted as if they were here.")


def _places(vllm_config: VllmConfig) -> Iterator[Place]:
    parallel = vllm_config.parallel_config
    for data in range(parallel.data_parallel_size):
        for stage in range(parallel.pipeline_parallel_size):
            yield from (Place(tensor, stage, data) for tensor in range(parallel.tensor_parallel_size))


def _plan(found: Verdict, vllm_config: VllmConfig, weights: Checkpoint | None) -> None:
    """Builds each rank's model, whose storage is not touched, and looks at what it wants."""
    runtime.start_mindspore("cpu")
    kernels.use(ReferenceKernels())  # no compiler, and no memory before it is written
    specs, unfit = [], None
    for place in _places(vllm_config):
        shell = _built(vllm_config, place)
        slots = list(shell.slots())
        found.weight_bytes.append(weight_bytes(slots, shell.dtype))
        specs.append(_cache_specs(vllm_config))
        if place == Place():
            _note_schemes(found, vllm_config, shell)
        if weights is not None and unfit is None:
            try:
                named, ignored = as_wanted(weights, shell, vllm_config.model_config, slots)
                check(named, slots, ignored=ignored)
            except ValueError as error:
                unfit = error
    try:
        memory.check_weights(sum(found.weight_bytes), host_memory(), len(specs))
    except memory.InsufficientMemoryError as error:
        found.problems.append(str(error))
    if unfit is not None:
        found.problems.append(str(unfit))
    if specs[0] and not found.problems:
        _plan_cache(found, vllm_config, specs)


def _built(vllm_config: VllmConfig, place: Place) -> Any:
    vllm_config.compilation_config.static_forward_context.clear()
    with planning(place), set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("cpu"):
        return initialize_model(vllm_config=vllm_config)


def _cache_specs(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """As vLLM's runner collects them."""
    found = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if (spec := layer.get_kv_cache_spec(vllm_config)) is not None:
            found[name] = customize_attention_spec(layer.get_attn_backend(), spec)
    return found


def _note_schemes(found: Verdict, vllm_config: VllmConfig, shell: Any) -> None:
    """How many linears have which scheme, by the checkpoint's description."""
    format = checkpoint_format(vllm_config)
    if format is None:
        found.quantization = "none"
        return
    found.quantization = format.name
    prefix = unnamed_prefix(vllm_config.model_config)
    parts = {
        part.name.removeprefix(prefix)
        for _, cell in shell.cell.cells_and_names()
        for scheme in (getattr(cell, "scheme", None), *(s for pair in getattr(cell, "schemes", ()) for s in pair))
        for part in getattr(scheme, "parts", ())
    }
    found.schemes = dict(Counter(describe(format.spec(name)) for name in sorted(parts)))


def _plan_cache(found: Verdict, vllm_config: VllmConfig, specs: list[dict[str, KVCacheSpec]]) -> None:
    """Each rank's cache once the weights are there, and what vLLM makes of it."""
    register_all_kvcache_specs(vllm_config)
    layouts = [layout.name for layout in MindSporeAttentionBackend.supported_kv_cache_layouts()]
    resolve_kv_cache_layout(vllm_config, [layouts], [spec for own in specs for spec in own.values()])
    host, weights = host_memory(), found.weight_bytes
    left = memory.HostMemory(host.total, max(0, host.available - sum(weights)))
    base = psutil.Process().memory_info().rss
    sizes = [
        cache_bytes(vllm_config, own, left, base + held, len(specs)) for own, held in zip(specs, weights, strict=True)
    ]
    configs = kv_cache_utils.get_kv_cache_configs(vllm_config, specs, sizes)
    config = kv_cache_utils.generate_scheduler_kv_cache_config(configs)
    found.kv_bytes_per_token = max(
        sum(spec.page_size_bytes // spec.block_size for spec in own.values()) for own in specs
    )
    found.kv_cache_bytes = min(sizes)
    found.kv_cache_tokens, _ = kv_cache_utils.get_kv_cache_capacity(vllm_config, config)
    found.max_model_len = vllm_config.model_config.max_model_len  # which vLLM may have fitted
