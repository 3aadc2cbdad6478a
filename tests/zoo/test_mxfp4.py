"""gpt-oss in MXFP4 against torch in float32, with the weights that transformers makes of the same bytes."""

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.checkpoints import checkpoint
from tests.distributed.rank_models import answers_of, check
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.comparison import VOCABULARY, differences, without_ties
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE
from tests.zoo.families.gpt_oss import SMALL
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.quantization.base import Part
from vllm_ms_models.quantization.formats import from_config
from vllm_ms_models.quantization.stacked import StackedMxfp4

QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in MXFP4, random bytes with scales that make weights of about 0.2, and in floats."""
    source = checkpoint("gpt_oss", **SMALL)
    floats = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    rng = np.random.default_rng(0)
    packed: dict[str, torch.Tensor] = {}
    for name in [name for name in floats if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = floats[name].shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8))
        scales = torch.from_numpy(rng.integers(122, 125, (experts, outputs, inputs // 32)).astype(np.uint8))
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        assert floats[name].shape == (experts, inputs, outputs)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    packed |= {name: tensor for name, tensor in floats.items() if f"{name}_blocks" not in packed}
    folders = []
    for kind, tensors, extra in (("packed", packed, {"quantization_config": QUANTIZATION}), ("floats", floats, {})):
        folder = tmp_path_factory.mktemp(kind)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))
        folders.append(folder)
    return folders[0], folders[1]


def test_tokens_and_logprobs(models: tuple[Path, Path]) -> None:
    packed, floats = models
    prompts, answers = without_ties(torch_reference.load(floats), LEAST_MARGIN)
    with engine(packed) as llm:
        outputs = greedy(llm, prompts, len(answers[0].tokens), prompt_logprobs=-1)
    found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    assert differences(found, answers).max() < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_ranks(models: tuple[Path, Path], expert_parallel: bool) -> None:
    """Each with 32 of the 64 inputs of every expert, one block; or with half of the experts."""
    packed, floats = models
    prompts, answers = without_ties(torch_reference.load(floats), LEAST_MARGIN)
    found = answers_of(packed, prompts, tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
    check(*found, answers, LOGPROB_TOLERANCE)


@pytest.mark.slow
def test_without_weights(models: tuple[Path, Path]) -> None:
    with engine(models[0], load_format="dummy", dtype="bfloat16") as llm:
        (tokens,) = token_ids(greedy(llm, [[1, 2, 3]], 4))
    assert len(tokens) == 4


def test_blocks_that_cannot_be_divided() -> None:
    part = Part("", (64, 64), slice(0, 64), slice(0, 16))
    with pytest.raises(ValueError, match="blocks of 32 inputs, which cannot be divided at 16 of 64; use another"):
        StackedMxfp4("model.layers.0.mlp.experts.down_proj", [part], 0, 6, ms.float32)


def test_other_settings_are_refused() -> None:
    with pytest.raises(CheckpointError, match="has settings that are not known here: 'block_size'"):
        from_config(QUANTIZATION | {"block_size": 16})
