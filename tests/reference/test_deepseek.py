"""DeepSeek-V2 and V3 against the torch models of transformers in float32: latent attention, both kinds of routing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import engine
from tests.reference import torch_reference
from tests.reference.test_float32 import Case, Result, check_tokens, log_softmax, rope, run
from tests.reference.torch_reference import LOGPROB_TOLERANCE


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    return rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=mscale, mscale_all_dim=mscale_all_dim)


def v3(options: dict[str, Any], **kwargs: Any) -> Case:
    return Case("deepseek_v3", DEEPSEEK | options, **kwargs)


def v2(options: dict[str, Any], **kwargs: Any) -> Case:
    sizes = {name: value for name, value in DEEPSEEK.items() if name != "num_nextn_predict_layers"}
    return Case("deepseek_v2", sizes | options, **kwargs)


PLAIN = {"rope_parameters": rope("default")}
CASES = {
    "v3 dense": v3({"first_k_dense_replace": 3}, seed=4),
    "v3 dense, without q_lora, yarn": v3(
        {"first_k_dense_replace": 3, "q_lora_rank": None, "rope_parameters": yarn(1.0, 1.0)}, without=PLAIN
    ),
    "v3 8 experts in 2 groups": v3({"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "v3 16 experts in 4 groups, 2 dense layers, no shared experts, without q_lora": v3(
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 2,
            "num_hidden_layers": 4,
            "n_shared_experts": 0,
            "q_lora_rank": None,
        }
    ),
    "v3 64 experts in 8 groups, 3 dense layers, yarn": v3(
        {
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "num_hidden_layers": 5,
            "n_shared_experts": 2,
            "rope_parameters": yarn(1.0, 1.0),
        },
        without=PLAIN,
    ),
    "v3 shares as they are, halves rotate, mscales differ": v3(
        {"norm_topk_prob": False, "rope_interleave": False, "rope_parameters": yarn(0.707, 1.0)},
        without={"rope_interleave": True},
        seed=1,
    ),
    "v3 32 experts in one group, biases of attention": v3(
        {"n_routed_experts": 32, "num_experts_per_tok": 3, "attention_bias": True}
    ),
    "v3 sizes that fill no vector, tied": v3(
        {
            "hidden_size": 84,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "kv_lora_rank": 37,
            "q_lora_rank": 19,
            "qk_nope_head_dim": 13,
            "qk_rope_head_dim": 10,
            "v_head_dim": 7,
            "tie_word_embeddings": True,
            "vocab_size": 131,
        }
    ),
    "v2 lite: greedy, without q_lora, yarn": v2(
        {
            "q_lora_rank": None,
            "n_routed_experts": 16,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "rope_parameters": yarn(0.707, 0.707),
        },
        without=PLAIN,
    ),
    "v2 16 experts in 4 groups": v2(
        {
            "topk_method": "group_limited_greedy",
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 3.0,
        },
        without={"routed_scaling_factor": 1.0},
    ),
    "v2 64 experts, none dense, no shared experts": v2(
        {"n_routed_experts": 64, "num_experts_per_tok": 8, "first_k_dense_replace": 0, "n_shared_experts": 0}
    ),
    "v2 dense, linear rope": v2(
        {"first_k_dense_replace": 3, "rope_parameters": rope("linear", factor=2.0)}, without=PLAIN
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_").replace(",", ""))
def result(request: pytest.FixtureRequest) -> Iterator[Result]:
    yield run(CASES[request.param])


@pytest.mark.feature("offline LLM", families=["deepseek_v3"])
def test_greedy_tokens_are_those_of_generate(result: Result) -> None:
    check_tokens(result)


def test_logprobs(result: Result) -> None:
    """Of every token of the vocabulary, after every position of the prompts and of what was generated."""
    for answer, prompt, tokens in zip(result.expected, result.prompt_logprobs, result.token_logprobs, strict=True):
        np.testing.assert_allclose(prompt, log_softmax(answer.prompt_logits), rtol=0, atol=LOGPROB_TOLERANCE)
        np.testing.assert_allclose(tokens, log_softmax(answer.token_logits), rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.without])
def test_cases_can_see_their_feature(name: str) -> None:
    """Without the rope or the factor that a case is about, torch itself answers otherwise."""
    case = CASES[name]
    model = torch_reference.load(case.folder)
    other = type(model).from_pretrained(case.folder, **case.without).eval()
    (prompt,) = random_prompts([150], case.vocab_size)
    difference = torch_reference.logits(model, prompt) - torch_reference.logits(other, prompt)
    assert difference.abs().max().item() > 1000 * LOGPROB_TOLERANCE


def as_published(case: Case, folder: Path) -> dict[str, Any]:
    """A copy of the checkpoint, with `rope_scaling` in config.json as DeepSeek writes it; returns the config."""
    shutil.copytree(case.folder, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling | {"type": scaling.pop("rope_type")}
    return config


def test_a_published_checkpoint(tmp_path: Path) -> None:
    """Older names in config.json, and the layers that predict further tokens, which are not read."""
    case = CASES["v3 64 experts in 8 groups, 3 dense layers, yarn"]
    folder = tmp_path / "published"
    config = as_published(case, folder)
    config |= {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    (folder / "config.json").write_text(json.dumps(config))
    extra = {f"model.layers.5.{name}.weight": torch.zeros(3) for name in ("eh_proj", "shared_head.norm", "mlp.gate")}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    check_tokens(run(case, folder))


def test_layers_that_the_config_does_not_announce_are_not_ignored(tmp_path: Path) -> None:
    case = CASES["v3 dense"]
    folder = tmp_path / "unknown"
    shutil.copytree(case.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(Exception, match=r"model\.layers\.3\.eh_proj\.weight"), engine(folder):
        pass


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_refused_configs(family: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    case = CASES["v3 8 experts in 2 groups" if family == "deepseek_v3" else "v2 16 experts in 4 groups"]
    folder = tmp_path / "refused"
    shutil.copytree(case.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | options))
    with pytest.raises(ValueError, match=message), engine(folder):
        pass


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_holds_latents_and_rotated_keys_only(dtype: str, itemsize: int) -> None:
    """What vLLM allocates, to the byte: (kv_lora_rank + qk_rope_head_dim) values for each token and layer."""
    case = CASES["v3 8 experts in 2 groups"]
    with engine(case.folder, dtype=dtype) as llm:
        cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        (group,) = cache.kv_cache_groups
        tokens = cache.num_blocks * group.kv_cache_spec.block_size
        assert len(group.layer_names) == 3
        assert sum(tensor.size for tensor in cache.kv_cache_tensors) == tokens * 3 * (32 + 8) * itemsize


NO_INT8 = (
    "--kv-cache-dtype int8_per_token_head is not supported for multi-head latent attention, whose cache is small "
    "already; use --kv-cache-dtype auto."
)


@pytest.mark.feature("KV cache of int8", families=["deepseek_v3"], refused=NO_INT8)
def test_an_int8_cache_is_refused() -> None:
    folder = checkpoint("deepseek_v3", **CASES["v3 dense"].options)
    with pytest.raises(ValueError, match=NO_INT8), engine(folder, kv_cache_dtype="int8_per_token_head"):
        pass
