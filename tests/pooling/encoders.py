"""Small encoders of BERT's kind with random weights, their tokenizers, and what transformers says of them."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from tests import checkpoints
from tests.pooling.models import save

CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig, "xlm_roberta": XLMRobertaConfig}
VOCABULARY = 211
DEFAULTS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 90,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What may differ from one to the other, three of each; the first is tested in more ways.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "two types": {"pad_token_id": 0},
        "three heads of 20": {"hidden_size": 60, "num_attention_heads": 3, "intermediate_size": 100},
        "one type": {"type_vocab_size": 1, "hidden_act": "relu", "layer_norm_eps": 1e-5, "pad_token_id": None},
    },
    "roberta": {
        "positions from 2": {"pad_token_id": 1},
        "positions from 1, 2 types": {"pad_token_id": 0, "type_vocab_size": 2, "num_attention_heads": 8},
        "positions from 6": {"pad_token_id": 5, "hidden_size": 80, "num_attention_heads": 2, "hidden_act": "gelu_new"},
    },
    "xlm_roberta": {
        "positions from 2": {"pad_token_id": 1, "num_attention_heads": 1},
        "positions from 4": {"pad_token_id": 3, "hidden_act": "silu", "num_hidden_layers": 2},
        "two types": {"pad_token_id": 1, "type_vocab_size": 2, "hidden_size": 72, "num_attention_heads": 6},
    },
}
FIRST = {family: next(iter(cases.values())) for family, cases in CASES.items()}
HEADS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}

WORDS = (
    "what",
    "is",
    "the",
    "opposite",
    "of",
    "hot",
    "cold",
    "spell",
    "cat",
    "12",
    "19",
    "+",
    "?",
    ".",
    "##s",
    "##ing",
)
SPECIAL = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "roberta": ("<s>", "<pad>", "</s>", "<unk>")}


def encoder(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """A random encoder without a head."""
    config = CONFIGS[family](**(DEFAULTS | options))
    return checkpoints.randomized(AutoModel.from_config(config, dtype=torch.float32)).to(dtype)


def with_head(family: str, kind: str, labels: int, **options: Any) -> torch.nn.Module:
    """A random encoder that classifies; `kind` is one of HEADS."""
    config = CONFIGS[family](**(DEFAULTS | {"num_labels": labels} | options))
    return checkpoints.randomized(HEADS[kind].from_config(config, dtype=torch.float32))


def longest(model: torch.nn.Module) -> int:
    """How many tokens a sequence may have."""
    config = model.config
    return config.max_position_embeddings - (0 if config.model_type == "bert" else config.pad_token_id + 1)


def prompts(model: torch.nn.Module, lengths: Sequence[int] = (5, 1, 70, 33)) -> list[list[int]]:
    """Of so many tokens, and one that is as long as may be; without the padding, which transformers does not count."""
    pad = model.config.pad_token_id or 0
    given = checkpoints.random_prompts([*lengths, longest(model)], VOCABULARY - 1)
    return [[token + (token >= pad) for token in prompt] for prompt in given]


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Pairs of texts have two types of tokens in BERT's, and three signs between and around them in RoBERTa's."""
    special = SPECIAL["bert" if family == "bert" else "roberta"]
    letters = [part + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for part in ("", "##")]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*special, *WORDS, *letters)))}
    assert len(vocabulary) <= VOCABULARY
    if family == "bert":
        pad, unknown, begin, end = special
        single, pair = f"{begin}:0 $A:0 {end}:0", f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1"
    else:
        begin, pad, end, unknown = special
        single, pair = f"{begin} $A {end}", f"{begin} $A {end} {end} $B {end}"
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    signs = [(sign, vocabulary[sign]) for sign in (begin, end)]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=signs)
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if family == "bert" else ["input_ids", "attention_mask"]
    names = {"pad_token": pad, "unk_token": unknown, "cls_token": begin, "sep_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)


def save_encoder(model: torch.nn.Module, **entries: Any) -> Path:
    """A folder with `model`, its tokenizer, and `entries` in config.json."""
    folder = save(model, **entries)
    tokenizer(model.config.model_type.replace("-", "_")).save_pretrained(folder)
    return folder


@torch.inference_mode()
def scores(model: torch.nn.Module, query: str, document: str) -> np.ndarray:
    """A cross-encoder's, of a pair of texts: float64 `[labels]`."""
    given = tokenizer(model.config.model_type.replace("-", "_"))(query, document, return_tensors="pt")
    return model(**given).logits[0].double().numpy()


def rename(folder: Path, changes: dict[str, str]) -> None:
    """In the checkpoint's only file, the names of its tensors: each key of `changes` is replaced."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        for old, new in changes.items():
            name = new + name if old == "" else name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def architectures(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "config.json").read_text())["architectures"]
    return found
