"""Calibration prompts out of a file of JSON lines."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IDS = ("token_ids", "prompt_token_ids")
TEXTS = ("text", "prompt")
EXPECTED = 'a dictionary with "text", "prompt", "messages" or "token_ids" is expected'


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, and whether the file has more than were taken."""

    ids: list[list[int]]
    more: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def read_prompts(path: Path, folder: Path, vocab_size: int, limit: int, longest: int) -> Prompts:
    """The first prompts that are `limit` tokens together; one of more than `longest` tokens is cut to these.

    Text is tokenized by the tokenizer of `folder`, which is only looked for if there is text. If the first prompt is
    over the limit already, it is cut. ValueError names the line that is not understood.
    """
    tokenize = _Tokenizer(folder)
    ids: list[list[int]] = []
    room = limit
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            prompt = _parse(line, f"{path}, line {number}", tokenize, vocab_size)[:longest]
            if ids and len(prompt) > room:
                return Prompts(ids, True)
            ids.append(prompt[:room])
            room -= len(ids[-1])
            if not room:
                return Prompts(ids, any(line.strip() for line in lines))
    if not ids:
        raise ValueError(f"{path} has no prompts; {EXPECTED} in each line.")
    return Prompts(ids, False)


class _Tokenizer:
    """transformers' tokenizer of a model, loaded when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = None

    def get(self) -> Any:
        if self.tokenizer is None:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return self.tokenizer

    def text(self, text: str) -> list[int]:
        return list(self.get()(text).input_ids)

    def messages(self, messages: Any) -> list[int]:
        text = self.get().apply_chat_template(messages, tokenize=False)
        return list(self.get()(text, add_special_tokens=False).input_ids)


def _parse(line: str, where: str, tokenize: _Tokenizer, vocab_size: int) -> list[int]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: this is not JSON ({error}); {EXPECTED}.") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {EXPECTED}.")
    key = next((name for name in (*TEXTS, "messages", *IDS) if name in entry), None)
    if key is None:
        raise ValueError(f"{where}: {EXPECTED}.")
    value = entry[key]
    if key in IDS:
        ids = value
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise ValueError(f"{where}: {key} must be a list of token ids from 0 to {vocab_size - 1}.")
    elif key in TEXTS:
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a string.")
        ids = _tokenized(tokenize.text, value, where)
    else:
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError(f"{where}: messages must be a list of dictionaries.")
        ids = _tokenized(tokenize.messages, value, where)
    if not ids:
        raise ValueError(f"{where}: the prompt is empty.")
    return ids


def _tokenized(tokenize: Callable[[Any], list[int]], value: Any, where: str) -> list[int]:
    """Whatever a tokenizer or a chat template raises, as an error of the line."""
    try:
        return tokenize(value)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{where}: the model's tokenizer cannot take it ({reason}); give token_ids instead."
        ) from error
