"""Encoders of BERT's kind by vLLM's engine, which keeps no KV cache for them, and by transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from tests.cli.quantizing import quantize
from tests.engines import engine
from tests.pooling.encoders import (
    CASES,
    FIRST,
    encoder,
    longest,
    prompts,
    rename,
    save_encoder,
    scores,
    tokenizer,
    with_head,
)
from tests.pooling.models import (
    OPTIONS,
    TOLERANCE,
    check,
    decoder,
    hidden,
    logits,
    normalized,
    pooled,
    save,
    sentence_transformer,
    sigmoid,
    softmax,
    token_prompts,
)
from tests.pooling.test_classification import ANSWERS, QUESTION, classified, close
from tests.pooling.test_embeddings import embeddings
from tests.quantization.comparison import UNIT_TOLERANCE
from tests.quantization.models import write_model
from tests.quantization.writers_compressed import SCHEMES
from tests.reference.torch_reference import LOGPROB_TOLERANCE

SERVED: dict[str, Any] = {**OPTIONS, "max_model_len": None}
FAMILIES = list(CASES)
QUICK = [("bert", "two types", "MEAN"), ("roberta", "positions from 2", "CLS"), ("xlm_roberta", "two types", "MEAN")]
EVERY = [
    pytest.param(family, case, pooling, marks=() if (family, case, pooling) in QUICK else pytest.mark.slow)
    for family, cases in CASES.items()
    for case in cases
    for pooling in ("CLS", "MEAN")
]


@pytest.mark.feature("embeddings of texts")
@pytest.mark.parametrize(("family", "case", "pooling"), EVERY)
def test_embeddings(family: str, case: str, pooling: str) -> None:
    """Of prompts that share batches, one of which has every position; CLS is the default."""
    model = encoder(family, **CASES[family][case])
    given = prompts(model)
    chosen = {} if pooling == "CLS" else {"pooler_config": {"pooling_type": pooling}}
    with engine(save_encoder(model), **chosen, **SERVED) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == longest(model)
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(pooled(hidden(model, prompt), pooling)))


@pytest.mark.slow  # quick in 16 bits
@pytest.mark.feature("embeddings of tokens")
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_tokens(family: str) -> None:
    model = encoder(family, **FIRST[family])
    given = prompts(model)
    with engine(save_encoder(model), pooler_config={"task": "token_embed"}, **SERVED) as llm:
        outputs = llm.encode(token_prompts(given), pooling_task="token_embed", use_tqdm=False)
        for output, prompt in zip(outputs, given, strict=True):
            check(output.outputs.data, normalized(hidden(model, prompt)))


def test_no_memory_for_a_cache() -> None:
    """Whatever is asked for; and prompts that are alike are computed each time, in both directions."""
    model = encoder("bert")
    first, *_ = prompts(model)
    given = [first, first, [*first[:-1], first[-1] ^ 1]]
    with engine(save_encoder(model), kv_cache_memory_bytes=1 << 50, **SERVED) as llm:
        (runner,) = llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc(
            lambda worker: worker.model_runner
        )
        assert runner.kv_caches == []
        same, again, other = embeddings(llm, given)
    check(same, normalized(hidden(model, first)[0]))
    np.testing.assert_allclose(same, again, rtol=0, atol=TOLERANCE)
    assert np.abs(same - other).max() > 0.01


@pytest.mark.slow
def test_reference_kernels() -> None:
    model = encoder("roberta", **FIRST["roberta"])
    given = prompts(model)
    with engine(save_encoder(model), {"VLLM_MS_KERNELS": "reference"}, **SERVED) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(hidden(model, prompt)[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "names"), [("bert", {"": "bert."}), ("roberta", {"": "roberta."})])
def test_other_names(family: str, names: dict[str, str]) -> None:
    """As checkpoints of masked language models have them, the oldest with TensorFlow's names of norms."""
    model = encoder(family, **FIRST[family])
    folder = save_encoder(model)
    rename(folder, names | {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"})
    given = prompts(model)
    with engine(folder, **SERVED) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(hidden(model, prompt)[0]))


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("classification of texts")
@pytest.mark.parametrize("family", ["roberta", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[::2])])
def test_classes_of_texts(family: str) -> None:
    from vllm import PoolingParams

    model = with_head(family, "sequence", 3, **FIRST[family])
    given = prompts(model)
    wanted = [logits(model, prompt) for prompt in given]
    assert np.ptp(np.stack(wanted)) > 1, "scores must differ"
    with engine(save_encoder(model), **SERVED) as llm:
        for found, row in zip(classified(llm, given), wanted, strict=True):
            close(found, softmax(row))
        for found, row in zip(
            classified(llm, given, pooling_params=PoolingParams(use_activation=False)), wanted, strict=True
        ):
            close(found, row)


@pytest.mark.feature("classification of tokens")
@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_classes_of_tokens(family: str) -> None:
    model = with_head(family, "token", 5, **FIRST[family])
    given = prompts(model)
    with engine(save_encoder(model), **SERVED) as llm:
        outputs = llm.encode(token_prompts(given), pooling_task="token_classify", use_tqdm=False)
        for output, prompt in zip(outputs, given, strict=True):
            close(output.outputs.data, softmax(logits(model, prompt)))


@pytest.mark.feature("pairs of texts: score and rerank")
@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_pairs(family: str) -> None:
    """Both texts are read together; of BERT's tokens the second text's have a type of their own."""
    model = with_head(family, "sequence", 1, **FIRST[family])
    wanted = [sigmoid(scores(model, QUESTION, answer))[0] for answer in ANSWERS]
    assert np.ptp(wanted) > 10 * LOGPROB_TOLERANCE
    with engine(save_encoder(model), **SERVED) as llm:
        close([output.outputs.score for output in llm.score(QUESTION, ANSWERS, use_tqdm=False)], wanted)


def test_types_of_tokens_matter() -> None:
    """Else the test above would show nothing; and a batch may have texts without a second one among its pairs."""
    from vllm import PoolingParams

    model = with_head("bert", "sequence", 2, **FIRST["bert"])
    given = prompts(model, (12, 9))
    types = [7, None, 4]  # where the second text begins
    wanted = []
    for prompt, first in zip(given, types, strict=True):
        kinds = torch.arange(len(prompt)) >= (len(prompt) if first is None else first)
        with torch.inference_mode():
            row = model(torch.tensor([prompt]), token_type_ids=kinds.long()[None]).logits[0]
        wanted.append(row.double().numpy())
    assert np.abs(wanted[0] - logits(model, given[0])).max() > 0.1
    params = [
        PoolingParams(
            use_activation=False, extra_kwargs=None if first is None else {"compressed_token_type_ids": first}
        )
        for first in types
    ]
    with engine(save_encoder(model), **SERVED) as llm:
        for found, row in zip(classified(llm, given, pooling_params=params), wanted, strict=True):
            close(found, row)


# --- ranks, 16 bits, integers ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("encoders on two tensor-parallel ranks")
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_two_ranks(family: str) -> None:
    model = encoder(family, **FIRST[family])
    given = prompts(model)
    with engine(save_encoder(model), tensor_parallel_size=2, **SERVED) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            check(found, normalized(hidden(model, prompt)[0]))


@pytest.mark.slow
@pytest.mark.feature("encoders on two tensor-parallel ranks", families=["xlm_roberta"])
def test_classes_on_two_ranks() -> None:
    model = with_head("xlm_roberta", "sequence", 3, pad_token_id=1)
    given = prompts(model)
    with engine(save_encoder(model), tensor_parallel_size=2, **SERVED) as llm:
        for found, prompt in zip(classified(llm, given), given, strict=True):
            close(found, softmax(logits(model, prompt)))


@pytest.mark.feature("encoders in bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_16_bits_are_no_further_off_than_torch(family: str, dtype: torch.dtype) -> None:
    """From float32's answer with the same weights. Both round at the same places, so that errors are of one size.

    Each is the mean over 400 tokens; over all cases here they differ by 0.5% at most, which is their scatter.
    """
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    model = encoder(family, dtype, **(FIRST[family] | sizes))
    folder = save_encoder(model)
    exact = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    given = prompts(model, (5, 1, 70, 33, 60, 50, 44, 80))
    wanted, torch16 = (np.concatenate([normalized(hidden(m, prompt)) for prompt in given]) for m in (exact, model))
    served = {**SERVED, "dtype": str(dtype).removeprefix("torch.")}
    with engine(folder, pooler_config={"task": "token_embed"}, **served) as llm:
        outputs = llm.encode(token_prompts(given), pooling_task="token_embed", use_tqdm=False)
    ours = np.concatenate([np.asarray(output.outputs.data, np.float64) for output in outputs])
    off, limit = (np.linalg.norm(found - wanted, axis=-1).mean() for found in (ours, torch16))
    assert limit / 2 < off < 1.02 * limit
    assert (ours * wanted).sum(-1).min() > 0.9999


@pytest.mark.feature("encoders in W8A8")
@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_w8a8(family: str, tmp_path: Path) -> None:
    """The reference does the same arithmetic in NumPy."""
    model = encoder(family, **FIRST[family])
    given = prompts(model)
    quantized = write_model(tmp_path, model, SCHEMES["w8a8 dynamic"], given)
    assert len(quantized.linears) == 6 * model.config.num_hidden_layers
    wanted = [normalized(hidden(quantized.model, prompt)[0]) for prompt in given]
    tokenizer(family).save_pretrained(quantized.folder)
    with engine(quantized.folder, **SERVED) as llm:
        found = embeddings(llm, given)
    off = np.array([np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)])
    assert off.max() < UNIT_TOLERANCE / 10
    assert np.median(off) < TOLERANCE


# --- sentence-transformers, decoders ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "MEAN"), ("cls_token", "CLS")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sentence_transformers_folder(mode: str, pooling: str, normalize: bool) -> None:
    model = encoder("xlm_roberta", **FIRST["xlm_roberta"])
    folder = sentence_transformer(save_encoder(model), mode, normalize)
    given = prompts(model)
    with engine(folder, skip_tokenizer_init=False, max_model_len=None) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            row = pooled(hidden(model, prompt), pooling)
            check(found, normalized(row) if normalize else row)


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("qwen2", "MEAN"), *(pytest.param(f, "LAST", marks=pytest.mark.slow) for f in ("llama", "qwen3", "qwen2"))],
)
def test_a_decoder_in_both_directions(family: str, pooling: str) -> None:
    """`"is_causal": false` in config.json, as gte-Qwen2 has: transformers with a mask that hides nothing."""
    model = decoder(family)
    given = [prompt[:80] for prompt in prompts(encoder("bert"))]
    wanted = []
    for prompt in given:
        everything = torch.zeros(1, 1, len(prompt), len(prompt))
        with torch.inference_mode():
            states = model(torch.tensor([prompt]), attention_mask=everything).last_hidden_state[0].double().numpy()
        wanted.append(pooled(states, pooling))
    assert np.abs(normalized(wanted[2]) - normalized(pooled(hidden(model, given[2]), pooling))).max() > 0.01
    folder = save(model, is_causal=False)
    with engine(folder, pooler_config={"pooling_type": pooling}, **OPTIONS) as llm:
        for found, row in zip(embeddings(llm, given), wanted, strict=True):
            check(found, normalized(row))


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--scheme", "w8a8-dynamic"], ["--scheme", "w8a8-static", "calibrated"]], ids=str)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_quantized_here(family: str, options: list[str], tmp_path: Path) -> None:
    """`vllm-ms quantize`: the vectors hardly turn. Rounding to 8 bits is off by 1/254 of the largest value at most."""
    model = encoder(family, **FIRST[family])
    given = prompts(model)
    calibrated = options[-1] == "calibrated"
    folder = quantize(save_encoder(model), tmp_path / "out", *options[:2], calibrated=calibrated)
    with engine(folder, **SERVED) as llm:
        for found, prompt in zip(embeddings(llm, given), given, strict=True):
            cosine = found @ normalized(hidden(model, prompt)[0])
            assert 0.995 < cosine < 0.99999
