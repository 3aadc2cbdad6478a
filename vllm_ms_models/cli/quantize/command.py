"""`vllm-ms quantize`, step by step."""

import argparse
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_ms_models import registry, runtime
from vllm_ms_models.bridge.encoder import learned_positions
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.cli.quantize import GROUP_SIZES, layouts, modules, writing
from vllm_ms_models.cli.quantize.calibration import Blueprint, Statistics, blueprint, calibrate
from vllm_ms_models.cli.quantize.conversion import Conversion, Item
from vllm_ms_models.cli.quantize.prompts import Prompts, read_prompts
from vllm_ms_models.cli.quantize.report import NAME, Report, mib
from vllm_ms_models.cli.quantize.smoothing import Smoothing, smooth
from vllm_ms_models.cli.quantize.source import Source, open_source
from vllm_ms_models.quantization.formats.modelslim import ModelSlim

logger = logging.getLogger("vllm.ms_models")
STEMS = {"compressed-tensors": "model", "modelslim": "quant_model_weights"}


@dataclass(frozen=True)
class Plan:
    """What is written: the steps, what they need, and what says so."""

    selection: modules.Selection
    conversion: Conversion
    items: list[Item]
    head: str | None
    group_size: int | None


def quantize(options: argparse.Namespace, command: str, shard_bytes: int = writing.SHARD_BYTES) -> None:
    """Writes the copy that `options` ask for, or raises: ValueError, CheckpointError, OSError."""
    out = Path(options.out)
    writing.require_absent(out)
    source = open_source(options.model)
    registry.check(source.architecture)
    if options.smoothquant is not None and source.architecture in registry.ENCODERS:
        raise ValueError(
            f"--smoothquant is not possible for {source.architecture}, whose norms feed the residual sum too; leave it "
            "out."
        )
    if source.architecture in registry.MULTIMODAL:
        raise CheckpointError(
            f"{source.architecture} reads images, and quantizing such a model is not supported here; llm-compressor "
            "does it, and what it writes is served."
        )
    prompts = _prompts(options, source)
    runtime.start(source.dtype, "cpu")
    longest = max(map(len, prompts.ids)) if prompts else 1
    model = blueprint(source, longest)
    selection = modules.select(model, source, options.ignore, options.lm_head)
    group_size = None
    if options.scheme == "w4a16":
        group_size = modules.group_size(selection, options.group_size, GROUP_SIZES)
    statistics = _calibrated(model, prompts)
    smoothing = Smoothing()
    if options.smoothquant is not None:
        linears = {linear.parts[0].name: [part.name for part in linear.parts] for linear in model.observer.linears}
        smoothing = smooth(source, selection.modules, linears, statistics, options.smoothquant)
    layout = layouts.layout(options.scheme, options.format, source.dtype, group_size or 0)
    conversion = Conversion(source, selection.modules, layout, statistics, smoothing)
    head = model.head if options.lm_head else None
    plan = Plan(selection, conversion, conversion.items(), head, group_size)
    with writing.staging(out) as folder:
        report = _write(plan, options, folder, shard_bytes, prompts, command)
    before, after = report.total
    print(f"{out}: {mib(after)} of weights, {mib(before)} before; see {NAME}.md in it.")


def _prompts(options: argparse.Namespace, source: Source) -> Prompts | None:
    if options.calibration is None:
        return None
    config = source.hf_config()
    longest = getattr(config, "max_position_embeddings", options.calibration_tokens)
    if source.architecture in registry.ENCODERS:
        longest = learned_positions(source.architecture, config)
    path = Path(options.calibration)
    return read_prompts(path, source.folder, config.vocab_size, options.calibration_tokens, longest)


def _calibrated(model: Blueprint, prompts: Prompts | None) -> dict[str, Statistics]:
    if prompts is None:
        return {}
    with tqdm(total=len(model.blocks), desc="Calibrating", unit="linear") as bar:
        return calibrate(model, prompts.ids, lambda: bar.update())


def _write(
    plan: Plan, options: argparse.Namespace, folder: Path, shard_bytes: int, prompts: Prompts | None, command: str
) -> Report:
    """Weights, kept files and report, and config.json last of all: before, nothing can be loaded."""
    source, items = plan.conversion.source, plan.items
    shards = writing.into_shards([item.tensors for item in items], shard_bytes)
    total = sum(source.checkpoint.tensors[item.source].nbytes for item in items)
    with (
        writing.Weights(folder, STEMS[options.format], shards) as weights,
        tqdm(total=total, desc="Quantizing", unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        errors = plan.conversion.run(items, weights, bar.update)
    size = weights.write_index()
    for path in source.kept_files():
        shutil.copyfile(path, folder / path.name)
    report = Report(
        command,
        options.scheme,
        options.format,
        errors,
        {item.module.name: _sizes(source, item) for item in items if item.module is not None},
        (source.checkpoint.nbytes, size),
        plan.selection.ignored,
        len(prompts.ids) if prompts else 0,
        prompts.tokens if prompts else 0,
        bool(prompts and prompts.more),
        plan.group_size,
        options.smoothquant,
        plan.conversion.smoothing.origins,
    )
    report.write(folder)
    config = _config(plan, options, folder)
    writing.write_json(folder / "config.json", config)
    return report


def _sizes(source: Source, item: Item) -> tuple[int, int]:
    return source.checkpoint.tensors[item.source].nbytes, sum(writing.nbytes(*t) for t in item.tensors.values())


def _config(plan: Plan, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """config.json of the copy; writes ModelSlim's description, which takes the place of its quantization_config."""
    config = dict(plan.conversion.source.config)
    if plan.head is not None:
        config["tie_word_embeddings"] = False
    if options.format == "modelslim":
        quantized = {name: item.module is not None for item in plan.items for name in item.tensors}
        writing.write_json(folder / ModelSlim.file, layouts.description(options.scheme, quantized))
    else:
        config["quantization_config"] = layouts.quantization_config(
            options.scheme, plan.group_size or 0, plan.selection.ignored, plan.head
        )
    return config
