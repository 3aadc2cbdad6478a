"""`vllm serve` of a model that embeds, and of a reranker: every endpoint, against transformers and NumPy.

The texts are the demo tokenizer's; the client is OpenAI's own where it has the request.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from tests.pooling.models import (
    check,
    decoder,
    hidden,
    logits,
    normalized,
    save,
    sentence_transformer,
    softmax,
    tokenizer,
)
from tests.pooling.test_classification import ANSWERS, QUESTION, QWEN3_RERANKER, close, reranker
from tests.servers import Server, serve

pytestmark = pytest.mark.serving

TEXTS = [QUESTION, "What is 12 + 7?", *ANSWERS]
OPTIONS = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128"]
COSINE_TOLERANCE = 5e-6  # of two embeddings that may both be off


@pytest.fixture(scope="module")
def embedder() -> Iterator[tuple[Server, torch.nn.Module]]:
    """As sentence-transformers saves one: mean pooling, normalised; its first dimensions may be used alone."""
    model = decoder("qwen2")
    folder = sentence_transformer(save(model, is_matryoshka=True), "mean_tokens", normalize=True)
    with serve(folder, *OPTIONS) as server:
        yield server, model


@pytest.fixture(scope="module")
def judge() -> Iterator[tuple[Server, torch.nn.Module]]:
    model, folder = reranker(tied=True)
    overrides = json.dumps(QWEN3_RERANKER["hf_overrides"])
    with serve(folder, *OPTIONS, "--runner", "pooling", "--hf-overrides", overrides) as server:
        yield server, model


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "tiny", **body}, timeout=60)


def embedded(model: torch.nn.Module, text: str) -> np.ndarray:
    states = hidden(model, tokenizer()(text)["input_ids"])
    return states.sum(0) / len(states)


def relevance(model: torch.nn.Module, query: str, document: str) -> float:
    tokens = tokenizer()(query + document)["input_ids"]
    no, yes = tokenizer().convert_tokens_to_ids(["cold", "hot"])
    return float(softmax(logits(model, tokens)[-1][[no, yes]])[1])


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
def test_embeddings_through_the_openai_client(
    embedder: tuple[Server, torch.nn.Module], encoding: dict[str, Any]
) -> None:
    """Without a format the client asks for base64 and decodes it; asked for, it hands it on."""
    server, model = embedder
    answer = server.client.embeddings.create(model="tiny", input=TEXTS, **encoding)
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    for item, text in zip(answer.data, TEXTS, strict=True):
        vector: Any = item.embedding
        if isinstance(vector, str):
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        check(vector, normalized(embedded(model, text)))
    count = sum(len(tokenizer()(text)["input_ids"]) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == count


def test_tokens_dimensions_and_activation(embedder: tuple[Server, torch.nn.Module]) -> None:
    """What is cut is normalised after it was cut."""
    server, model = embedder
    tokens = tokenizer()(QUESTION)["input_ids"]
    whole = embedded(model, QUESTION)
    found = server.client.embeddings.create(model="tiny", input=tokens, dimensions=16).data[0].embedding
    check(found, normalized(whole[:16]))
    raw = server.client.embeddings.create(model="tiny", input=QUESTION, extra_body={"use_activation": False})
    check(raw.data[0].embedding, whole)


def test_bad_requests(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, _ = embedder
    with pytest.raises(openai.BadRequestError, match=r"range \[1, 64\]"):
        server.client.embeddings.create(model="tiny", input=QUESTION, dimensions=65)
    with pytest.raises(openai.BadRequestError, match="128"):
        server.client.embeddings.create(model="tiny", input=[1] * 129)


def test_it_does_not_write_texts(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, _ = embedder
    with pytest.raises(openai.APIStatusError):
        server.client.completions.create(model="tiny", prompt=QUESTION)
    with pytest.raises(openai.APIStatusError):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": QUESTION}])
    assert server.client.embeddings.create(model="tiny", input=QUESTION).data  # and it goes on


def test_pooling(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, model = embedder
    answer = post(server, "/pooling", input=TEXTS).json()
    for item, text in zip(answer["data"], TEXTS, strict=True):
        check(item["data"], normalized(embedded(model, text)))


@pytest.mark.feature("rerank and score", families=["qwen2"])
def test_scores_are_cosines(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, model = embedder
    vectors = [normalized(embedded(model, text)) for text in (QUESTION, *ANSWERS)]
    wanted = [float(vectors[0] @ vector) for vector in vectors[1:]]
    answer = post(server, "/score", text_1=QUESTION, text_2=ANSWERS).json()
    for item, cosine in zip(answer["data"], wanted, strict=True):
        assert abs(item["score"] - cosine) < COSINE_TOLERANCE
    ranked = post(server, "/rerank", query=QUESTION, documents=ANSWERS).json()["results"]
    assert [item["index"] for item in ranked] == sorted(range(len(ANSWERS)), key=lambda i: -wanted[i])


@pytest.mark.feature("rerank and score", families=["qwen3"])
def test_a_reranker(judge: tuple[Server, torch.nn.Module]) -> None:
    server, model = judge
    wanted = [relevance(model, QUESTION, answer) for answer in ANSWERS]
    scores = post(server, "/score", text_1=QUESTION, text_2=ANSWERS).json()["data"]
    close([item["score"] for item in scores], wanted)
    best = post(server, "/rerank", query=QUESTION, documents=ANSWERS, top_n=2).json()["results"]
    assert [item["index"] for item in best] == sorted(range(len(ANSWERS)), key=lambda i: -wanted[i])[:2]
    close([item["relevance_score"] for item in best], sorted(wanted, reverse=True)[:2])
    classes = post(server, "/classify", input=[QUESTION + answer for answer in ANSWERS]).json()["data"]
    close([item["probs"][0] for item in classes], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes"), [("qwen2", {}), ("mixtral", {"num_local_experts": 4})])
def test_data_parallel_ranks(family: str, sizes: dict[str, Any]) -> None:
    """Two engines, which share the experts of a mixture; then one text, while the other engine has none."""
    model = decoder(family, **sizes)
    with serve(save(model), *OPTIONS, "--data-parallel-size", "2", seconds=400) as server:
        for texts in (TEXTS * 4, TEXTS[:1]):
            answer = server.client.embeddings.create(model="tiny", input=texts)
            for item, text in zip(answer.data, texts, strict=True):
                check(item.embedding, normalized(hidden(model, tokenizer()(text)["input_ids"])[-1]))
