"""What is no adapter of the model, or asks for more than is supported: a sentence, and the engine goes on."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import checkpoint
from tests.engines import engine
from tests.lora.adapters import adapter, ask, check, lora, requests, torch_models

if TYPE_CHECKING:
    from vllm import LLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def llm() -> "Iterator[LLM]":
    with engine(checkpoint("qwen2"), enable_lora=True, max_lora_rank=8) as llm:
        yield llm


def config(**entries: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def tensors(**extra: tuple[int, ...]) -> Damage:
    """Adds tensors, or replaces them, by names in which __ stands for a dot; of no size: removes them."""

    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        for name, shape in extra.items():
            key = name.replace("__", ".").replace("LAYER", LAYER)
            found[key] = torch.zeros(shape)
            if 0 in shape:
                del found[key]
        save_file(found, folder / WEIGHTS)

    return change


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])


BROKEN: dict[str, tuple[Damage, str]] = {
    "rank": (config(rank_pattern={"q_proj": 9}), r"q_proj\.lora_A\.weight' .* has shape \[4, 64\] where \[9, ...\] is"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"adapter_config\.json cannot be read \(No such file"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), r"adapter_config\.json is not valid JSON"),
    "another method": (config(peft_type="IA3"), r"peft_type 'IA3'; only LORA adapters are supported"),
    "no rank": (config(r=0), r"has r 0 where a number above 0 is expected"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no adapter_model\.safetensors; save it with PEFT"),
    "truncated": (cut, r"adapter_model\.safetensors is truncated"),
    "DoRA": (config(use_dora=True), r"asks for DoRA \(use_dora\), which is not supported"),
    "modules_to_save": (
        config(modules_to_save=["lm_head"]),
        r"modules of its own in place of the model's \(modules_to",
    ),
    "bias": (config(bias="all"), r"asks for bias 'all', which is not supported; use none"),
    "PiSSA": (config(init_lora_weights="pissa"), r"init_lora_weights 'pissa', with which PEFT changes the model's own"),
    "one matrix": (
        tensors(LAYER__mlp__up_proj__lora_B__weight=(0,)),
        r"up_proj\.lora_A\.weight', but no lora_B for it",
    ),
    "shape": (
        tensors(LAYER__mlp__up_proj__lora_B__weight=(90, 4)),
        r"Tensor '.*layers\.0\.mlp\.up_proj\.lora_B\.weight' of adapter .* has shape \[90, 4\] where \[96, 4\] is exp",
    ),
    "embedding": (
        tensors(base_model__model__model__embed_tokens__lora_embedding_A=(4, 211)),
        r"Tensor 'base_model\.model\.model\.embed_tokens\.lora_embedding_A' of adapter .*, which is no lora_A or",
    ),
    "head": (
        tensors(
            base_model__model__lm_head__lora_A__weight=(4, 64), base_model__model__lm_head__lora_B__weight=(211, 4)
        ),
        r"is for lm_head: adapters of the embedding and the head are not supported; .* without lm_head",
    ),
    "experts": (
        tensors(
            LAYER__mlp__experts__0__up_proj__lora_A__weight=(4, 64),
            LAYER__mlp__experts__0__up_proj__lora_B__weight=(96, 4),
        ),
        r"mlp\.experts\.0\.up_proj: adapters of experts are not supported",
    ),
    "kv_b_proj": (
        tensors(
            LAYER__self_attn__kv_b_proj__lora_A__weight=(4, 64), LAYER__self_attn__kv_b_proj__lora_B__weight=(96, 4)
        ),
        r"kv_b_proj: latent attention absorbs this matrix into others",
    ),
    "unknown": (
        tensors(LAYER__self_attn__w_pack__lora_A__weight=(4, 64), LAYER__self_attn__w_pack__lora_B__weight=(96, 4)),
        r"is for model\.layers\.0\.self_attn\.w_pack: the model has no linear layer of that name",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapter(llm: "LLM", tmp_path: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    folder = shutil.copytree(adapter("qwen2", 1), tmp_path / "adapter")
    damage(folder)
    with pytest.raises(Exception, match=re.compile(sentence, re.S)):
        llm.llm_engine.add_lora(lora(folder, 5))
    assert llm.llm_engine.list_loras() == set()


def test_larger_rank_than_allowed(llm: "LLM") -> None:
    with pytest.raises(Exception, match="has rank 9, which is more than --max-lora-rank 8; raise it"):
        llm.llm_engine.add_lora(lora(adapter("qwen2", 1, r=9), 5))


def test_missing_folder(llm: "LLM") -> None:
    with pytest.raises(Exception, match="No adapter found for /nowhere"):
        llm.llm_engine.add_lora(lora(Path("/nowhere"), 5))


def test_the_engine_goes_on(llm: "LLM") -> None:
    wanted = requests(torch_models(checkpoint("qwen2"), [adapter("qwen2", 1)]), [5, 6])
    check(ask(llm, wanted, [adapter("qwen2", 1)]), wanted)


REFUSED: dict[str, dict[str, Any]] = {
    "--fully-sharded-loras": {"fully_sharded_loras": True},
    "--lora-target-modules": {"lora_target_modules": ["q_proj"]},
    "--enable-tower-connector-lora": {"enable_tower_connector_lora": True},
    "--specialize-active-lora": {"specialize_active_lora": True},
    "--enable-mixed-moe-lora-format": {"enable_mixed_moe_lora_format": True},
    "--enable-moe-shared-loras": {"enable_moe_shared_loras": True},
    "--max-lora-cls-labels": {"max_lora_cls_labels": 2},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_refused_flag(flag: str) -> None:
    with (
        pytest.raises(ValueError, match=f"{flag} is not supported; leave it out"),
        engine(checkpoint("qwen2"), enable_lora=True, **REFUSED[flag]),
    ):
        pass


def test_refused_with_speculation() -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with (
        pytest.raises(ValueError, match="--enable-lora is not supported with --speculative-config; leave out one"),
        engine(checkpoint("qwen2"), enable_lora=True, speculative_config=speculation),
    ):
        pass


def test_refused_for_a_model_that_embeds() -> None:
    with (
        pytest.raises(ValueError, match="--enable-lora is not supported yet for models that embed or classify"),
        engine(checkpoint("qwen2"), enable_lora=True, runner="pooling", max_logprobs=5),
    ):
        pass
