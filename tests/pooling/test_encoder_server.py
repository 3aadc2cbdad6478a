"""`vllm serve` of an encoder that embeds, and of a cross-encoder: through the `openai` client or as JSON."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from tests.pooling.encoders import FIRST, encoder, longest, save_encoder, scores, tokenizer, with_head
from tests.pooling.models import check, hidden, normalized, sentence_transformer, sigmoid
from tests.pooling.test_classification import ANSWERS, QUESTION, close
from tests.pooling.test_pooling_server import COSINE_TOLERANCE
from tests.servers import Server, serve

pytestmark = pytest.mark.serving

TEXTS = [QUESTION, *ANSWERS, "12 + 7?", ""]
OPTIONS = ["--served-model-name", "tiny", "--dtype", "float32"]


@pytest.fixture(scope="module")
def embedder() -> Iterator[tuple[Server, torch.nn.Module]]:
    """As multilingual-e5 is published: XLM-RoBERTa, mean pooling, normalised."""
    model = encoder("xlm_roberta", **FIRST["xlm_roberta"])
    with serve(sentence_transformer(save_encoder(model), "mean_tokens", normalize=True), *OPTIONS) as server:
        yield server, model


@pytest.fixture(scope="module")
def judge() -> Iterator[tuple[Server, torch.nn.Module]]:
    """As ms-marco-MiniLM is published: BERT with one label."""
    model = with_head("bert", "sequence", 1, **FIRST["bert"])
    with serve(save_encoder(model), *OPTIONS) as server:
        yield server, model


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json={"model": "tiny", **body}, timeout=60)


def embedded(model: torch.nn.Module, text: str) -> np.ndarray:
    return normalized(hidden(model, tokenizer("xlm_roberta")(text)["input_ids"]).mean(0))


@pytest.mark.feature("embeddings of texts", families=["xlm_roberta"])
def test_embeddings(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, model = embedder
    answer = server.client.embeddings.create(model="tiny", input=TEXTS)
    for item, text in zip(answer.data, TEXTS, strict=True):
        check(item.embedding, embedded(model, text))
    assert answer.usage.prompt_tokens == sum(len(tokenizer("xlm_roberta")(text)["input_ids"]) for text in TEXTS)


def test_no_more_tokens_than_positions(embedder: tuple[Server, torch.nn.Module]) -> None:
    """The longest sequence is served, one more token is refused, and the server goes on."""
    server, model = embedder
    tokens = [7] * longest(model)
    found = server.client.embeddings.create(model="tiny", input=tokens).data[0].embedding
    check(found, normalized(hidden(model, tokens).mean(0)))
    with pytest.raises(openai.BadRequestError, match=str(longest(model))):
        server.client.embeddings.create(model="tiny", input=[*tokens, 7])
    with pytest.raises(openai.APIStatusError):
        server.client.completions.create(model="tiny", prompt=QUESTION)
    check(server.client.embeddings.create(model="tiny", input=tokens).data[0].embedding, np.asarray(found))


def test_scores_are_cosines(embedder: tuple[Server, torch.nn.Module]) -> None:
    server, model = embedder
    wanted = [float(embedded(model, QUESTION) @ embedded(model, answer)) for answer in ANSWERS]
    answer = post(server, "/score", text_1=QUESTION, text_2=ANSWERS).json()
    for item, cosine in zip(answer["data"], wanted, strict=True):
        assert abs(item["score"] - cosine) < COSINE_TOLERANCE


@pytest.mark.feature("pairs of texts: score and rerank", families=["bert"])
def test_a_reranker(judge: tuple[Server, torch.nn.Module]) -> None:
    server, model = judge
    wanted = [float(sigmoid(scores(model, QUESTION, answer))[0]) for answer in ANSWERS]
    found = post(server, "/score", text_1=QUESTION, text_2=ANSWERS).json()["data"]
    close([item["score"] for item in found], wanted)
    best = post(server, "/rerank", query=QUESTION, documents=ANSWERS, top_n=2).json()["results"]
    assert [item["index"] for item in best] == sorted(range(len(ANSWERS)), key=lambda i: -wanted[i])[:2]
    close([item["relevance_score"] for item in best], sorted(wanted, reverse=True)[:2])


def test_classes(judge: tuple[Server, torch.nn.Module]) -> None:
    """Of single texts, whose tokens are all of one type."""
    server, model = judge
    classes = post(server, "/classify", input=ANSWERS).json()["data"]
    with torch.inference_mode():
        rows = [
            model(**tokenizer("bert")(answer, return_tensors="pt")).logits[0].double().numpy() for answer in ANSWERS
        ]
    close([item["probs"] for item in classes], [sigmoid(row) for row in rows])


@pytest.mark.slow
def test_data_parallel_ranks() -> None:
    """Two engines; then one text, while the other engine has none."""
    model = encoder("xlm_roberta", **FIRST["xlm_roberta"])
    folder = sentence_transformer(save_encoder(model), "mean_tokens", normalize=True)
    with serve(folder, *OPTIONS, "--data-parallel-size", "2", seconds=400) as server:
        for texts in (TEXTS * 4, TEXTS[:1]):
            answer = server.client.embeddings.create(model="tiny", input=texts)
            for item, text in zip(answer.data, texts, strict=True):
                check(item.embedding, embedded(model, text))
