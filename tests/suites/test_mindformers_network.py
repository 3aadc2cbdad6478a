"""mindformers' networks as they are: our loader against its own, and what they are fed on Ascend (not run there)."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, float16, float32

from tests.checkpoints import checkpoint
from tests.engines import engine
from tests.suites.test_mindformers import CASES, SOURCE, folder_of
from vllm_ms_models import runtime
from vllm_ms_models.checkpoint import load
from vllm_ms_models.kernels import PagedSequences
from vllm_ms_models.layers.batch import CacheView
from vllm_ms_models.layers.context import ModelContext


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    runtime.start("float32")


def made(folder: Path) -> Any:
    """The network of a checkpoint, without weights; norms, rotary embeddings, attention and experts are its own."""
    from transformers import AutoConfig

    from vllm_ms_models.suites.mindformers import MODELS, network

    config = AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    return network.make(architecture, MODELS[architecture], config, ModelContext(float32, 256), "cpu")


@pytest.mark.parametrize("case", CASES)
def test_loaded_as_by_mindformers_itself(case: str) -> None:
    """Each parameter, those of the experts included, has the same values as after mindformers' `load_weights`."""
    from vllm_ms_models.suites.mindformers import weights

    folder = folder_of(case)
    ours, theirs = made(folder), made(folder)
    tied = ours.config.tie_word_embeddings
    load(folder, weights.slots(ours), ignored=["lm_head.weight"] if tied else [], progress=False)
    ours.process_weights_after_loading(ours.model)
    theirs.load_weights(str(folder))
    expected = {name: parameter.asnumpy() for name, parameter in theirs.model.parameters_and_names()}
    found = {name: parameter.asnumpy() for name, parameter in ours.model.parameters_and_names()}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if case.startswith("glm4_moe") and name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
            assert (expected[name] == 1).all()  # what mindformers forgets
            assert values.std() > 0.1
            continue
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
        assert values.std() > 0.05, name  # nothing is as it was made


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder_of("qwen3"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(Exception, match=r"1 of 36 wanted tensors are missing: 'model\.layers\.1\.self_attn\.k_proj"),
        engine(tmp_path, additional_config=SOURCE),
    ):
        pass


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no bfloat16 on a CPU; add --dtype float32": ("qwen3", {}, {"dtype": "bfloat16"}),
    "Qwen2ForCausalLM has layers with a sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {},
    ),
    "rope type 'dynamic'": (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {},
    ),
    "hidden_act 'gelu'": ("qwen3", {"hidden_act": "gelu"}, {}),
    "LlamaForCausalLM is not served from mindformers; its models that are served here are Deep": ("llama", {}, {}),
    "--tensor-parallel-size 2 is not supported for models of mindformers": ("qwen3", {}, {"tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_before_anything_is_loaded(sentence: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    family, config, options = REFUSED[sentence]
    arguments: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True} | options
    with pytest.raises(ValueError) as raised:
        EngineArgs(str(checkpoint(family, **config)), additional_config=SOURCE, **arguments).create_engine_config()
    assert sentence in str(raised.value)


def view(query_lens: list[int], seq_lens: list[int], tables: list[list[int]], slots: list[int]) -> CacheView:
    starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    sequences = PagedSequences(
        query_start=Tensor(starts),
        seq_lens=Tensor(np.array(seq_lens, np.int32)),
        block_tables=Tensor(np.array(tables, np.int32)),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    return CacheView(sequences, Tensor(np.array(slots, np.int64)))


def test_what_a_network_is_told_of_a_mixed_step() -> None:
    """A chunk that goes on at position 16, a single token, and a prompt; blocks of 16 tokens."""
    from vllm_ms_models.suites.mindformers.ascend import step_inputs

    slots = [5 * 16, 5 * 16 + 1, 7 * 16 + 3, 9 * 16, 9 * 16 + 1, 9 * 16 + 2]
    step = view([2, 1, 3], [18, 4, 3], [[4, 5], [7, 0], [9, 0]], slots)
    fresh, places = step_inputs(step, 16, float16)
    assert not fresh
    mask = places.pop("attention_mask")
    expected = {
        "batch_valid_length": [18, 4, 3],
        "q_seq_lens": [2, 1, 3],
        "context_lens_tensor": [16, 3, 0],
        "block_tables": [[8, 10], [14, 0], [18, 0]],  # each block is two halves: keys, values
        "slot_mapping": [10 * 16, 10 * 16 + 1, 14 * 16 + 3, 18 * 16, 18 * 16 + 1, 18 * 16 + 2],
    }
    assert {name: tensor.asnumpy().tolist() for name, tensor in places.items()} == expected
    seen = mask.asnumpy() == 0
    assert [row.sum() for row in seen] == [17, 18, 4, 1, 2, 3]  # all positions up to its own, and not one behind
    assert all(row[: row.sum()].all() for row in seen)
    _, latents = step_inputs(step, None, float16)
    assert latents["slot_mapping"].asnumpy().tolist() == slots
    assert latents["block_tables"].asnumpy().tolist() == [[4, 5], [7, 0], [9, 0]]


def test_masks_of_other_steps() -> None:
    from vllm_ms_models.suites.mindformers.ascend import step_inputs

    fresh, prompts = step_inputs(view([3, 2], [3, 2], [[1], [2]], [16, 17, 18, 32, 33]), 16, float16)
    assert fresh
    np.testing.assert_array_equal(prompts["attention_mask"].asnumpy() != 0, np.triu(np.ones((128, 128)), 1) != 0)
    _, single = step_inputs(view([1, 1], [3, 2], [[1], [2]], [18, 33]), 16, float16)
    assert single["attention_mask"].asnumpy().tolist() == [[0.0]]


def test_the_configuration_in_other_words() -> None:
    """What transformers 5 has in `rope_parameters`, and what config.json does not say."""
    folder = folder_of("qwen2, tied, yarn, one KV head")
    config = made(folder).transformer_config
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["factor"] == 4.0
    assert (config.position_embedding_type, config.rotary_scaling_factor) == ("yarn", 4.0)
    assert config.max_position_embeddings == 64  # those that the scaling starts from
    assert (config.beta_fast, config.beta_slow) == (32.0, 1.0)  # as in transformers
    assert config.add_qkv_bias
    assert config.compute_dtype == float32
