"""Random adapters (LoRA), written by PEFT, and what PEFT and transformers say of a model that has one."""

import functools
import itertools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import DEEPSEEK, _root, checkpoint, random_model, random_prompts
from tests.engines import distributions
from tests.quantization.models import replace_module
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer
from tests.zoo.families.glm4_moe import FAMILY as GLM4_MOE

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.lora.request import LoRARequest

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
VOCABULARY = 211
TOKENS = 8


@dataclass(frozen=True)
class Family:
    """Options of a tiny model's config, and the modules that its adapters change."""

    options: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] | str = (*ATTENTION, *MLP)


FAMILIES = {
    "qwen2": Family(),
    "llama": Family({"attention_bias": True, "mlp_bias": True}),
    "mistral": Family({"sliding_window": 16}),
    "qwen3": Family({"tie_word_embeddings": True}),
    # Matrices of several projections, each with one adapter.
    "phi3": Family(modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    # Experts, which adapters leave alone, in all layers but one.
    "qwen3_moe": Family(
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
        r".*\.([qkvo]_proj|layers\.1\.mlp\.(gate|up|down)_proj)",
    ),
    "mixtral": Family(modules=ATTENTION),
    "granite": Family(),
    "olmo2": Family(),
    "gemma2": Family(),
    "gemma3": Family(),
    "glm4": Family(modules=(*ATTENTION, "gate_up_proj", "down_proj")),
    "gpt_oss": Family(modules=ATTENTION),
    "opt": Family(modules=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "glm4_moe": Family(
        next(iter(GLM4_MOE.cases.values())),
        r".*\.([qkvo]_proj|(layers\.0\.mlp|shared_experts)\.(gate|up|down)_proj)",
    ),
    # A dense layer, and shared experts in the others.
    "deepseek_v3": Family(DEEPSEEK, rf".*\.({'|'.join(LATENT)}|(layers\.0\.mlp|shared_experts)\.(gate|up|down)_proj)"),
}


def adapter(family: str, seed: int = 0, model_options: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Folder of a random adapter, written once in this process and removed at its end: by PEFT, unless the modules are
    given by a pattern.

    `options` are those of PEFT's LoraConfig, `model_options` those of the model's config (the family's by default).
    Both matrices are random (PEFT starts with B = 0), and large enough to change most tokens.
    """
    model_options = FAMILIES[family].options if model_options is None else model_options
    settings = {"r": 4, "lora_alpha": 8, "target_modules": FAMILIES[family].modules} | options
    return _write(family, json.dumps(dict(model_options), sort_keys=True), seed, json.dumps(settings, sort_keys=True))


@functools.cache
def _write(family: str, model_options: str, seed: int, options: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_adapter_", dir=_root()))
    base, settings = random_model(family, **json.loads(model_options)), json.loads(options)
    generator = torch.Generator().manual_seed(1000 + seed)
    if isinstance(settings["target_modules"], str):
        _write_by_hand(folder, base, settings, generator)
        return folder
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * SPREAD["lora_A" if "lora_A" in name else "lora_B"]
                )
    model.save_pretrained(str(folder))
    return folder


SPREAD = {"lora_A": 0.3, "lora_B": 0.1}


def _write_by_hand(folder: Path, base: torch.nn.Module, settings: dict[str, Any], generator: torch.Generator) -> None:
    """As PEFT did before transformers fused experts: today's takes the names of a dense MLP's linears for theirs."""
    tensors = {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(settings["target_modules"], name):
            rank = _of_module(settings.get("rank_pattern", {}), name, settings["r"])
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for matrix, shape in shapes.items():
                values = torch.randn(shape, generator=generator) * SPREAD[matrix]
                tensors[f"base_model.model.{name}.{matrix}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))


def _of_module(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if name.endswith(f".{key}")), default)


class Adapted(torch.nn.Module):
    """A linear and what an adapter adds to it."""

    def __init__(self, base: torch.nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.up.T)


def adapt(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`model` with an adapter, read without PEFT; of patterns, only ends of names are understood."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = len(down)
        alpha = _of_module(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        replace_module(model, name, Adapted(model.get_submodule(name), down, up, scale))
    return model


def three(family: str, **common: Any) -> list[Path]:
    """Adapters of different ranks and scales, for all modules or some."""
    names = {"deepseek_v3": ("kv_a_proj_with_mqa", "o_proj"), "phi3": ("qkv_proj",)}.get(family, ("q_proj", "v_proj"))
    by_pattern = isinstance(FAMILIES[family].modules, str)
    some = rf".*\.({'|'.join(names)})" if by_pattern else list(names)
    return [
        adapter(family, 1, **common),
        adapter(family, 2, r=8, lora_alpha=4, use_rslora=True, target_modules=some, **common),
        adapter(family, 3, r=3, rank_pattern={"o_proj": 5}, alpha_pattern={"v_proj": 5, "o_proj": 3}, **common),
    ]


def torch_models(folder: Path, adapters: Sequence[Path]) -> list[torch.nn.Module]:
    """The model of a checkpoint without and with each of the adapters: PEFT's, if PEFT has written them."""
    models = [torch_reference.load(folder)]
    for path in adapters:
        model = torch_reference.load(folder)
        if "peft_version" in json.loads((path / "adapter_config.json").read_text()):
            models.append(peft.PeftModel.from_pretrained(model, str(path)).get_base_model().eval())
        else:
            models.append(adapt(model, path))
    return models


@dataclass(frozen=True)
class Request:
    """A prompt, which adapter it is for (0: none), and what torch says."""

    prompt: list[int]
    adapter: int
    answer: Answer


def requests(models: Sequence[torch.nn.Module], lengths: Sequence[int], least: float = LEAST_MARGIN) -> list[Request]:
    """One of each length, for each of the models in turns; none whose tokens rounding could decide."""
    result = []
    for number, length in enumerate(lengths):
        which = number % len(models)
        for seed in itertools.count(100 * number):
            (prompt,) = random_prompts([length], seed=seed)
            answer = torch_reference.greedy(models[which], prompt, TOKENS)
            if answer.margin > least:
                break
            assert seed < 100 * number + 50, "the model cannot decide"
        result.append(Request(prompt, which, answer))
    return result


def lora(path: Path, number: int, **options: Any) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter {number}", number, str(path), **options)


def ask(llm: "LLM", wanted: Sequence[Request], adapters: Sequence[Path]) -> "list[RequestOutput]":
    """All at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=-1, prompt_logprobs=-1
    )
    prompts = [{"prompt_token_ids": request.prompt} for request in wanted]
    chosen = [lora(adapters[each.adapter - 1], each.adapter) if each.adapter else None for each in wanted]
    return llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)


def check(outputs: "Sequence[RequestOutput]", wanted: Sequence[Request], tolerance: float = LOGPROB_TOLERANCE) -> None:
    """Tokens, and log-probabilities of the whole vocabulary at each position."""
    for output, request in zip(outputs, wanted, strict=True):
        answer = request.answer
        assert list(output.outputs[0].token_ids) == answer.tokens
        for positions, logits in (
            (output.prompt_logprobs, answer.prompt_logits),
            (output.outputs[0].logprobs, answer.token_logits),
        ):
            want = torch.log_softmax(logits, -1).numpy()
            if len(want):
                assert np.abs(distributions(positions, VOCABULARY) - want).max() < tolerance


def folder_of(family: str) -> Path:
    return checkpoint(family, **FAMILIES[family].options)
