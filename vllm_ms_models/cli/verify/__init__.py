"""`vllm-ms verify MODEL`: this package's model against transformers' torch model, and where they part."""

import argparse
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="compare a model here with transformers' torch model",
        description="Runs a checkpoint in vLLM with MindSpore and in transformers with torch on the CPU, and compares "
        "tokens, log-probabilities and the hidden states after each layer. Exits with 0 if they agree, with 1 and the "
        "first layer and token that differ if they part. Both models are in memory one after the other.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face id of a model in floats that generates text")
    add(
        "--prompt", metavar="TEXT", action="append", default=[], help="instead of the built-in prompts; may be repeated"
    )
    add("--tokens", metavar="1,2,3", action="append", default=[], type=_tokens, help="a prompt of token ids")
    add("--max-tokens", metavar="N", type=_positive, default=16, help="after each prompt (default: %(default)s)")
    add("--dtype", default=DTYPES[0], choices=DTYPES, help="of both models (default: %(default)s)")
    add(
        "--tolerance",
        metavar="X",
        type=float,
        help="how far a token's hidden states may be apart, as a share of their length (default: 1e-4 in float32)",
    )
    add("--layers", action="store_true", help="print every layer's differences")
    add("--json", action="store_true", help="everything found, as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from vllm_ms_models.cli.verify.command import verify

    return verify(options)


def _tokens(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3")
    return [int(part) for part in parts]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)
