"""What `vllm-ms quantize` writes, served by vLLM, against torch models that compute as the written tensors say.

Tolerances are those of tests/quantization/test_quantized_models.py, where the reasons are.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import checkpoints
from tests.cli.quantizing import SIZES, as_torch, quantize, tensors
from tests.engines import distributions, engine, greedy, token_ids
from tests.quantization.test_quantized_models import TOKENS, UNIT_TOLERANCE, VOCABULARY, differences, without_ties
from tests.reference.torch_reference import LOGPROB_TOLERANCE

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


def case(family: str, options: dict, scheme: str, extra: tuple[str, ...], slow: bool) -> object:
    name = "-".join([family, *options, scheme, *(word.lstrip("-") for word in extra)])
    return pytest.param(family, options, scheme, extra, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "options", "scheme", "extra"), [case(*one) for one in CASES])
def test_tokens_and_logprobs(tmp_path: Path, family: str, options: dict, scheme: str, extra: tuple[str, ...]) -> None:
    source = checkpoints.checkpoint(family, **(SIZES | options))
    out = quantize(source, tmp_path / "out", "--scheme", scheme, *extra)
    model = as_torch(source, out)
    tolerance = LOGPROB_TOLERANCE if scheme == "w4a16" else UNIT_TOLERANCE
    prompts, answers = without_ties(model, 2 * tolerance)
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


def test_shards_of_a_tied_bfloat16_model(tmp_path: Path) -> None:
    """Several shards hold what one does, and are loaded."""
    import argparse

    from vllm_ms_models.cli import parser
    from vllm_ms_models.cli.quantize.command import quantize as run

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
