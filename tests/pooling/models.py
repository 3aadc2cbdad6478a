"""Small checkpoints that embed or classify, and what transformers and NumPy say of them."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)

from tests import checkpoints
from tests.servers import DEMO

VOCABULARY = 1024  # the demo tokenizer's
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

# What vLLM is asked for here; it looks at the tokenizer before it pools anything.
OPTIONS: dict[str, Any] = {"runner": "pooling", "skip_tokenizer_init": False}

# Of the length of what is compared (1 for embeddings). Both sides compute in float32 (eps 6e-8) but sum in different
# orders; over all cases here the largest difference is 6e-7. Other instruction sets sum differently again: four times.
TOLERANCE = 2.5e-6
LEAST_COSINE = 0.99999


@functools.cache
def _root() -> Path:
    folder = tempfile.mkdtemp(prefix="vllm_ms_models_pooling_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def tokenizer() -> PreTrainedTokenizerBase:
    return Qwen2Tokenizer.from_pretrained(DEMO)


def with_tokenizer(folder: Path) -> Path:
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder)
    return folder


def save(model: torch.nn.Module, **entries: Any) -> Path:
    """A folder with `model` as transformers saves it, `entries` in its config.json, and the demo tokenizer."""
    folder = Path(tempfile.mkdtemp(dir=_root()))
    model.save_pretrained(folder)
    edit_config(folder, **entries)
    return with_tokenizer(folder)


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def decoder(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """A random model without a head, saved as `Qwen2Model` and the like: no name begins with `model.`."""
    settings = checkpoints.config(family, vocab_size=VOCABULARY, **options)
    model = AutoModel.from_config(settings, dtype=torch.float32, experts_implementation="eager")
    return checkpoints.randomized(model).to(dtype)


def classifier(family: str, labels: int, tokens: bool = False, **options: Any) -> torch.nn.Module:
    """A random model with a head for `labels`: of the last token, or of all `tokens`, then with a bias."""
    settings = checkpoints.config(family, vocab_size=VOCABULARY, num_labels=labels, **options)
    kind = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    return checkpoints.randomized(kind.from_config(settings, dtype=torch.float32))


def sentence_transformer(folder: Path, mode: str, normalize: bool, dense: int = 0) -> Path:
    """The files that sentence-transformers writes beside a model whose pooling is `mode`, e.g. `mean_tokens`.

    `dense` is the output size of a random linear layer behind the pooling, with a bias and tanh; 0 for none.
    """
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    paths |= {"Normalize": "2_Normalize"} if normalize else {}
    paths |= {"Dense": "3_Dense"} if dense else {}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(paths.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64} | {f"pooling_mode_{name}": name == mode for name in modes})
    )
    if dense:
        _write_dense(folder / "3_Dense", dense)
    return folder


def _write_dense(folder: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(size, 64, generator=generator) * 0.2, torch.randn(size, generator=generator) * 0.2
    folder.mkdir()
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "in_features": 64,
                "out_features": size,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            }
        )
    )


def dense(folder: Path, vector: np.ndarray) -> np.ndarray:
    """That layer's result."""
    tensors = load_file(folder / "3_Dense" / "model.safetensors")
    return np.tanh(tensors["linear.weight"].astype(np.float64) @ vector + tensors["linear.bias"])


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    return checkpoints.random_prompts(lengths, seed=seed)


def token_prompts(given: Sequence[Sequence[int]]) -> list[Any]:
    """As vLLM takes them."""
    return [{"prompt_token_ids": list(tokens)} for tokens in given]


@torch.inference_mode()
def hidden(model: torch.nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """The last, normalised hidden states of a decoder, float64 `[tokens, hidden]`."""
    return model(torch.tensor([list(tokens)])).last_hidden_state[0].double().numpy()


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """Of a classifier, `[labels]` or `[tokens, labels]`."""
    return model(torch.tensor([list(tokens)])).logits[0].double().numpy()


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    """One row of all, as sentence-transformers' `pooling_mode_...` mean it."""
    return {"LAST": states[-1], "MEAN": states.sum(0) / len(states), "CLS": states[0]}[pooling]


def normalized(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector * vector).sum(-1, keepdims=True))


def check(found: Any, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Of vectors along the last axis: the angle, and every element."""
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    lengths = np.linalg.norm(wanted, axis=-1, keepdims=True)
    cosines = (found * wanted).sum(-1) / lengths[..., 0] / np.linalg.norm(found, axis=-1)
    assert cosines.min() >= LEAST_COSINE
    assert (np.abs(found - wanted) / lengths).max() <= tolerance


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
