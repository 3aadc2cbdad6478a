"""What `vllm-ms quantize` writes, served by vLLM, against torch models that compute as the written tensors say.

Tolerances are those of tests/quantization/test_quantized_models.py, where the reasons are. There, inputs in the middle
between two integers are allowed for; here prompts without are chosen, so that the tokens must be the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import checkpoints
from tests.cli.quantizing import SIZES, arrays, as_torch, end, nearest_tie, quantize, tensors, unpacked
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.comparison import LENGTHS, TOKENS, UNIT_TOLERANCE, VOCABULARY, differences
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE, Answer
from vllm_ms_models.cli import parser
from vllm_ms_models.cli.quantize.command import quantize as run

# Steps: one unit of float32 of the largest input, 127 steps. Of 43 tokens with 640 inputs each, one prompt in three has
# an input as near to a middle.
NO_TIE = 127 * 2.0**-24
TIED = {"tie_word_embeddings": True}
SMOOTH = ("--smoothquant", "0.5")
SLIM = ("--format", "modelslim")
CASES = [
    # One of each scheme quickly; the others in `make test-all`.
    ("qwen2", {}, "w8a8-dynamic", ("--lm-head",), False),
    ("qwen2", {}, "w8a8-static", SMOOTH, False),
    ("llama", {}, "w4a16", (), False),
    ("qwen2", TIED, "w8a8-dynamic", ("--lm-head",), True),
    ("llama", TIED, "w8a8-static", ("--lm-head", *SMOOTH), True),
    ("llama", TIED, "w8a8-dynamic", ("--lm-head", *SLIM), True),
    ("qwen2", {}, "w8a8-static", ("--lm-head", *SLIM), True),
    ("qwen2", {}, "w8a8-static", (*SLIM, *SMOOTH), True),
    ("qwen2", {}, "w8a8-static", ("--ignore", "*.down_proj", "--ignore", "re:.*\\.0\\.self_attn\\.[qkv]_proj"), True),
    ("qwen2", TIED, "w4a16", ("--group-size", "16"), True),
]


def chosen(model: torch.nn.Module, least: float) -> tuple[list[list[int]], list[Answer]]:
    """A prompt of each length with no token chosen by less than `least` and no input near a middle; the answers."""
    prompts, answers = [], []
    for length in LENGTHS:
        for seed in range(200):
            (prompt,) = checkpoints.random_prompts([length], seed=seed)
            answer = torch_reference.greedy(model, prompt, TOKENS)
            if answer.margin > least and nearest_tie(model, prompt + answer.tokens) > NO_TIE:
                break
        else:
            raise AssertionError("every prompt has a tie")
        prompts.append(prompt)
        answers.append(answer)
    return prompts, answers


def case(family: str, options: dict, scheme: str, extra: tuple[str, ...], slow: bool) -> object:
    name = "-".join([family, *options, scheme, *(word.lstrip("-") for word in extra)])
    return pytest.param(family, options, scheme, extra, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "options", "scheme", "extra"), [case(*one) for one in CASES])
def test_tokens_and_logprobs(tmp_path: Path, family: str, options: dict, scheme: str, extra: tuple[str, ...]) -> None:
    source = checkpoints.checkpoint(family, **(SIZES | options))
    out = quantize(source, tmp_path / "out", "--scheme", scheme, *extra)
    model = as_torch(source, out)
    tolerance = LOGPROB_TOLERANCE if scheme == "w4a16" else UNIT_TOLERANCE
    prompts, answers = chosen(model, 2 * tolerance)
    with engine(out, max_model_len=64) as llm:
        outputs = greedy(llm, prompts, TOKENS, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    off = differences(found, answers)
    assert off.max() < tolerance
    assert np.median(off) < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    if "--lm-head" in extra:
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert tensors(out)["lm_head.weight"].dtype == torch.int8
        assert tensors(out)["model.embed_tokens.weight"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "w4a16"])
def test_transformers_reads_it_too(tmp_path: Path, scheme: str) -> None:
    """By compressed-tensors' own decompression, at the first step: weights in floats, whatever the activations."""
    from transformers import AutoModelForCausalLM

    source = checkpoints.checkpoint("llama", **(SIZES | {"hidden_size": 128}))
    extra = () if scheme == "w4a16" else ("--lm-head",)
    out = quantize(source, tmp_path / "out", "--scheme", scheme, *extra)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    found = arrays(out)
    for name, module in model.named_modules():
        own = end(found, name)
        if "weight_packed" in own:
            scales = own["weight_scale"]
            integers = unpacked(own["weight_packed"])
            wanted = integers * np.repeat(scales, integers.shape[1] // scales.shape[1], 1)
        elif "weight_scale" in own:
            wanted = own["weight"] * own["weight_scale"]
        else:
            continue
        np.testing.assert_allclose(module.weight.detach().numpy(), wanted, rtol=2**-23)


def test_shards_of_a_tied_bfloat16_model(tmp_path: Path) -> None:
    """Several shards hold what one does, and are loaded."""
    source = checkpoints.checkpoint("llama", 0, torch.bfloat16, **(SIZES | TIED))
    whole = quantize(source, tmp_path / "whole", "--scheme", "w8a8-dynamic", "--lm-head", calibrated=False)
    words = ["quantize", str(source), str(tmp_path / "cut"), "--scheme", "w8a8-dynamic", "--lm-head"]
    run(parser().parse_args(words, argparse.Namespace(words=words)), "", shard_bytes=30_000)
    cut = tmp_path / "cut"
    assert len(list(cut.glob("model-*-of-*.safetensors"))) > 3
    assert all(path.stat().st_size < 35_000 for path in cut.glob("*.safetensors"))
    one, other = tensors(whole), tensors(cut)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((cut / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        value.nbytes for value in one.values()
    )
