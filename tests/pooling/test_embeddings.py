"""Embeddings of every family and pooling, by vLLM's engine and by transformers and NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.checkpoints import DEEPSEEK, random_model
from tests.engines import counter, engine
from tests.pooling.models import (
    OPTIONS,
    TOLERANCE,
    check,
    decoder,
    dense,
    hidden,
    normalized,
    pooled,
    prompts,
    save,
    sentence_transformer,
    token_prompts,
    with_tokenizer,
)
from tests.quantization.comparison import UNIT_TOLERANCE
from tests.quantization.models import SIZES, write_model, written
from tests.quantization.writers_compressed import SCHEMES
from tests.quantization.writers_others import SCHEMES as OTHERS

LENGTHS = (5, 1, 70, 40, 33)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "llama": ("llama", {}),
    "mistral_window": ("mistral", {"sliding_window": 16}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
}
QUICK = [("qwen3", "LAST"), ("mistral_window", "MEAN"), ("qwen2_windows", "CLS")]
CASES = [
    pytest.param(family, pooling, marks=() if (family, pooling) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for pooling in ("LAST", "MEAN", "CLS")
]


def embeddings(llm: Any, given: list[list[int]], **options: Any) -> list[np.ndarray]:
    return [np.array(output.outputs.embedding) for output in llm.embed(token_prompts(given), use_tqdm=False, **options)]


@pytest.mark.feature("embeddings", families=["qwen2", "llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_embeddings(family: str, pooling: str) -> None:
    """Normalised and as they are; of prompts that share batches, and that are longer than a window."""
    from vllm import PoolingParams

    name, options = FAMILIES[family]
    model = decoder(name, **options)
    given = prompts(LENGTHS)
    wanted = [pooled(hidden(model, prompt), pooling) for prompt in given]
    with engine(save(model), pooler_config={"pooling_type": pooling}, **OPTIONS) as llm:
        for found, row in zip(embeddings(llm, given), wanted, strict=True):
            check(found, normalized(row))
        raw = embeddings(llm, given, pooling_params=PoolingParams(use_activation=False))
        for found, row in zip(raw, wanted, strict=True):
            check(found, row)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_whole_model_without_its_head(tied: bool) -> None:
    """`Qwen3ForCausalLM` with `--runner pooling` (and `model.` before its names): the head is neither made nor read."""
    whole = random_model("qwen3", tie_word_embeddings=tied)
    given = prompts(LENGTHS)
    with engine(save(whole), **OPTIONS) as llm:
        (model,) = llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc(
            lambda worker: worker.model_runner.model
        )
        assert model.lm_head is None
        assert not [slot.name for slot in model.slots() if slot.name.startswith("lm_head")]
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(hidden(whole.model, prompt)[-1]))


def test_chunks_and_the_prefix_cache() -> None:
    """Prompts read 16 tokens at a time, then once more from the cache: the last token's vector, and all tokens'.

    Those are put together from the chunks and so are not read from the cache.
    """
    model = decoder("qwen2")
    given = prompts((70, 5, 100, 33))
    options: dict[str, Any] = {"max_num_batched_tokens": 16, "block_size": 16, "disable_log_stats": False, **OPTIONS}
    with engine(save(model), **options) as llm:
        for _ in range(2):
            for found, prompt in zip(embeddings(llm, given), given, strict=True):
                check(found, normalized(hidden(model, prompt)[-1]))
        assert counter(llm, "vllm:prefix_cache_hits") > 0
    with engine(save(model), pooler_config={"task": "token_embed"}, **options) as llm:
        for _ in range(2):
            outputs = llm.encode(token_prompts(given), pooling_task="token_embed", use_tqdm=False)
            for output, prompt in zip(outputs, given, strict=True):
                check(output.outputs.data, normalized(hidden(model, prompt)))


@pytest.mark.parametrize("pooling", ["MEAN", pytest.param("CLS", marks=pytest.mark.slow)])
def test_mean_and_first_read_prompts_whole(pooling: str) -> None:
    """vLLM switches chunks and the prefix cache off, which would leave tokens out."""
    model = decoder("qwen2")
    given = prompts((70, 5, 100, 70))
    given[3] = given[0][:60] + given[3][:10]
    options: dict[str, Any] = {"max_num_batched_tokens": 256, "block_size": 16}
    with engine(save(model), pooler_config={"pooling_type": pooling}, **options, **OPTIONS) as llm:
        for _ in range(2):
            for found, prompt in zip(embeddings(llm, given), given, strict=True):
                check(found, normalized(pooled(hidden(model, prompt), pooling)))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("pooling", ["MEAN", pytest.param("LAST", marks=pytest.mark.slow)])
def test_several_ranks(sizes: dict[str, Any], pooling: str) -> None:
    model = decoder("qwen2", num_hidden_layers=3)
    given = prompts(LENGTHS)
    with engine(save(model), pooler_config={"pooling_type": pooling}, **sizes, **OPTIONS) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(pooled(hidden(model, prompt), pooling)))


@pytest.mark.feature("embeddings", families=["quantized"])
@pytest.mark.parametrize("headless", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_w8a8(headless: bool, tmp_path: Path) -> None:
    """A decoder quantized by itself, whose description has its own names; and a language model with its head.

    The references do the same arithmetic in NumPy.
    """
    given = prompts(LENGTHS)
    if headless:
        quantized = write_model(tmp_path, decoder("qwen2", **SIZES), OTHERS["modelslim w8a8 dynamic"], given)
        reference = quantized.model
    else:
        quantized = written("qwen2", SCHEMES["w8a8 dynamic"])
        reference = quantized.model.model
    wanted = [normalized(hidden(reference, prompt)[-1]) for prompt in given]
    with engine(with_tokenizer(quantized.folder), **OPTIONS) as llm:
        found = embeddings(llm, given)
    off = np.array([np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)])
    # A unit of an activation may differ, which moves a logit by UNIT_TOLERANCE at most (comparison.py): the product of
    # a vector of length 9 and a row of the head of length 2, so that a tenth of it is left of a vector of length 1.
    assert off.max() < UNIT_TOLERANCE / 10
    assert np.median(off) < TOLERANCE


def test_bfloat16_is_no_further_off_than_torch() -> None:
    """From float32's answer with the same weights, which torch in bfloat16 measures: no tolerance of ours."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    model = decoder("qwen2", torch.bfloat16, **sizes)
    folder = save(model)
    exact = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    given = prompts((100, 33, 70, 200))
    wanted = [normalized(hidden(exact, prompt).mean(0)) for prompt in given]
    torch16 = [normalized(hidden(model, prompt).mean(0)) for prompt in given]
    with engine(folder, pooler_config={"pooling_type": "MEAN"}, dtype="bfloat16", **OPTIONS) as llm:
        ours = embeddings(llm, given)
    limit = np.linalg.norm(np.stack(torch16) - np.stack(wanted), axis=-1)
    off = np.linalg.norm(np.stack(ours) - np.stack(wanted), axis=-1)
    assert off.mean() <= limit.mean()
    assert min((a * b).sum() for a, b in zip(ours, wanted, strict=True)) > 0.999


@pytest.mark.slow
def test_a_sentence_transformers_folder() -> None:
    """`modules.json` alone makes a language model's checkpoint one that embeds, and says how.

    As Qwen3-Embedding is published: config.json names a whole model, and no tensor's name begins with `model.`.
    """
    model = decoder("qwen3", tie_word_embeddings=True)
    folder = sentence_transformer(save(model, architectures=["Qwen3ForCausalLM"]), "mean_tokens", normalize=False)
    given = prompts(LENGTHS)
    with engine(folder, skip_tokenizer_init=False) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, hidden(model, prompt).mean(0))


@pytest.mark.slow
def test_a_dense_layer_behind_the_pooling() -> None:
    """Of a sentence-transformers folder: read and computed by vLLM, in float32."""
    model = decoder("llama")
    folder = sentence_transformer(save(model), "lasttoken", normalize=True, dense=32)
    given = prompts(LENGTHS)
    with engine(folder, skip_tokenizer_init=False) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(dense(folder, hidden(model, prompt)[-1])))
