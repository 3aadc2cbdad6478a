"""Random adapters (LoRA), written by PEFT, and what PEFT and transformers say of a model that has one."""

import functools
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch

from tests.checkpoints import DEEPSEEK, _root, checkpoint, random_model, random_prompts
from tests.engines import distributions
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE, Answer

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

    options: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] | str = (*ATTENTION, *MLP)


FAMILIES = {
    "qwen2": Family(),
    "llama": Family({"attention_bias": True, "mlp_bias": True}),
    "mistral": Family({"sliding_window": 16}),
    "qwen3": Family({"tie_word_embeddings": True}),
    # Experts, which adapters leave alone, in all layers but one. Patterns: PEFT takes names of an MLP's for the experts'.
    "qwen3_moe": Family(
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [1]},
        r".*\.([qkvo]_proj|layers\.1\.mlp\.(gate|up|down)_proj)",
    ),
    "mixtral": Family(modules=ATTENTION),
    # A dense layer, and shared experts in the others.
    "deepseek_v3": Family(DEEPSEEK, rf".*\.({'|'.join(LATENT)}|(layers\.0\.mlp|shared_experts)\.(gate|up|down)_proj)"),
}


def adapter(family: str, seed: int = 0, model_options: dict[str, Any] | None = None, **options: Any) -> Path:
    """Folder of a random adapter, written once in this process by PEFT and removed at its end.

    `options` are those of PEFT's LoraConfig, `model_options` those of the model's config (the family's by default).
    Both matrices are random (PEFT starts with B = 0), and large enough to change most tokens.
    """
    model_options = FAMILIES[family].options if model_options is None else model_options
    settings = {"r": 4, "lora_alpha": 8, "target_modules": FAMILIES[family].modules} | options
    return _write(family, json.dumps(model_options, sort_keys=True), seed, json.dumps(settings, sort_keys=True))


@functools.cache
def _write(family: str, model_options: str, seed: int, options: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_adapter_", dir=_root()))
    base = random_model(family, **json.loads(model_options))
    model = peft.get_peft_model(base, peft.LoraConfig(**json.loads(options)))
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if "lora_A" in name else 0.1))
    model.save_pretrained(folder)
    return folder


def three(family: str, **common: Any) -> list[Path]:
    """Adapters of different ranks and scales, for all modules or some."""
    some = ["kv_a_proj_with_mqa", "o_proj"] if family == "deepseek_v3" else ["q_proj", "v_proj"]
    return [
        adapter(family, 1, **common),
        adapter(family, 2, r=8, lora_alpha=4, use_rslora=True, target_modules=some, **common),
        adapter(family, 3, r=3, rank_pattern={"o_proj": 5}, alpha_pattern={r"layers\.1\..*": 5}, **common),
    ]


def torch_models(folder: Path, adapters: Sequence[Path]) -> list[torch.nn.Module]:
    """The model of a checkpoint without and with each of the adapters, by transformers and PEFT."""
    base = torch_reference.load(folder)
    changed = [peft.PeftModel.from_pretrained(torch_reference.load(folder), path) for path in adapters]
    return [base, *(model.get_base_model().eval() for model in changed)]


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
