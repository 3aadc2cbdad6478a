"""`vllm-ms verify`: both runs, and what is printed of them."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_ms_models import registry
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.cli.quantize.source import Source, open_source
from vllm_ms_models.cli.verify.comparison import LOGPROB_TOLERANCE, TOLERANCE, Comparison, compare
from vllm_ms_models.cli.verify.runs import ours, theirs

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived a clockmaker who had never once been late. One morning",
)
LENGTHS = (3, 20, 60)  # of built-in prompts for a model without a tokenizer
ADVICE = "verify the model in floats that it was made from"


def verify(options: argparse.Namespace) -> int:
    """0 if both models agree, else 1. Raises ValueError for what cannot be compared."""
    if "vllm" not in sys.modules:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    source = open_source(options.model, ADVICE)
    registry.check(source.architecture)
    if source.architecture in registry.ENCODERS:
        raise CheckpointError(f"{source.architecture} generates no text, which is what is compared; verify another.")
    prompts = _prompts(source, options.prompt, options.tokens, options.max_tokens)
    mine = ours(source.folder, prompts, options.max_tokens, options.dtype)
    other = theirs(source.folder, prompts, [run.tokens for run in mine], options.dtype)
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    found = [
        compare(len(prompt), here, there, tolerance, LOGPROB_TOLERANCE[options.dtype])
        for prompt, here, there in zip(prompts, mine, other, strict=True)
    ]
    equal = all(one.equal for one in found)
    if options.json:
        prompts_found = [{**asdict(one), "equal": one.equal} for one in found]
        print(json.dumps({"equal": equal, "architecture": source.architecture, "prompts": prompts_found}, indent=2))
    else:
        print(f"{options.model}: {source.architecture} in {options.dtype}, here and in transformers")
        print("\n".join(line for number, one in enumerate(found, 1) for line in _lines(number, one, options.layers)))
        print("They agree." if equal else "They part.")
    return 0 if equal else 1


def _prompts(source: Source, texts: list[str], tokens: list[list[int]], new: int) -> list[list[int]]:
    """Token ids of the prompts that were given, or else of the built-in ones."""
    config = source.hf_config()
    if not texts and not tokens:
        if not any((source.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            generator = torch.Generator().manual_seed(0)
            return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
        texts = list(TEXTS)
    found = [*tokens, *_encoded(source.folder, texts)]
    most = getattr(config, "max_position_embeddings", None)
    for prompt in found:
        if not prompt or max(prompt) >= config.vocab_size:
            raise ValueError(f"A prompt of the tokens {prompt[:8]} is empty or not in the vocabulary; give another.")
        if most is not None and len(prompt) + new + 1 > most:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens, with {new} more (--max-tokens), is longer than the {most} "
                "positions of the model; give a shorter one."
            )
    return found


def _encoded(folder: Path, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def _lines(number: int, one: Comparison, layers: bool) -> Iterator[str]:
    yield f"prompt {number}, {one.length} tokens and {len(one.tokens)} generated:"
    if not one.stations:
        yield "  no layers were found to compare"
    for station in one.stations if layers else ():
        yield f"  {station.name.ljust(12)} {station.largest:.1e} at most, {station.relative:.1e} of a token's length"
    if one.first is not None:
        yield (
            f"  first part in {one.first.name}: at token {one.first.token} by {one.first.relative:.1e} of its length "
            f"(tolerance {one.tolerance:.0e}), one number by {one.first.largest:.1e}"
        )
    elif one.stations:
        worst = max(one.stations, key=lambda station: station.relative)
        yield f"  layers agree: {worst.relative:.1e} of a token's length at most (tolerance {one.tolerance:.0e})"
    beyond = one.logprobs > one.logprob_tolerance
    after = ", so final norm or head differ" if beyond and one.stations and one.first is None else ""
    yield f"  log-probabilities: {one.logprobs:.1e} apart at most (tolerance {one.logprob_tolerance:.0e}){after}"
    if one.parting is None:
        yield "  tokens are the same"
    else:
        part = one.parting
        yield (
            f"  token {part.step + 1} differs{', a tie' if part.tie else ''}: here {part.ours} "
            f"({part.our_logprobs[0]:.4f}, the other {part.our_logprobs[1]:.4f}), in transformers {part.theirs} "
            f"({part.their_logprobs[1]:.4f}, the other {part.their_logprobs[0]:.4f})"
        )
