"""`vllm-ms quantize MODEL OUT --scheme ...`: its options, and what of them goes together."""

import argparse
import shlex
from typing import Any

SCHEMES = ("w8a8-dynamic", "w8a8-static", "w4a16")
FORMATS = ("compressed-tensors", "modelslim")
GROUP_SIZES = (128, 64, 32, 16)


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize",
        help="write a quantized copy of a model",
        description="Writes a quantized copy of a model, layer by layer, with a report of what that costs in accuracy.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face id of a model in floats")
    add("out", metavar="OUT", help="folder to write; must not exist")
    add("--scheme", required=True, choices=SCHEMES, help="bits of weights and activations")
    add("--format", default=FORMATS[0], choices=FORMATS, help="how the copy is stored (default: %(default)s)")
    add("--calibration", metavar="FILE", help="JSON lines of prompts: text, prompt, messages or token_ids in each")
    add(
        "--calibration-tokens", metavar="N", type=_positive, default=8192, help="at most so many (default: %(default)s)"
    )
    add(
        "--smoothquant", metavar="ALPHA", type=_share, help="move outliers of inputs into the weights: 0 to 1, e.g. 0.5"
    )
    add("--ignore", metavar="PATTERN", action="append", default=[], help="leave modules in floats: glob or re:...")
    add("--group-size", type=int, default=128, choices=GROUP_SIZES, help="of w4a16, at most (default: %(default)s)")
    add("--lm-head", action="store_true", help="quantize the output head too (w8a8)")
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.calibration is None:
        for wanted, option in (
            (options.scheme == "w8a8-static", "--scheme w8a8-static"),
            (_smooth(options), "--smoothquant"),
        ):
            if wanted:
                parser.error(f"{option} needs the ranges of activations: give prompts with --calibration FILE.")
    if options.scheme == "w4a16":
        if options.format == "modelslim":
            parser.error(
                "--scheme w4a16 is not written as modelslim, which has no reader here; use --format compressed-tensors."
            )
        if options.lm_head:
            parser.error("--lm-head is for the schemes w8a8-dynamic and w8a8-static; leave it out for w4a16.")
        if _smooth(options):
            parser.error(
                "--smoothquant is for int8 activations; leave it out for w4a16, whose activations stay in floats."
            )
    from vllm_ms_models.cli.quantize.command import quantize

    quantize(options, shlex.join(["vllm-ms", *options.words]))


def _smooth(options: argparse.Namespace) -> bool:
    return options.smoothquant is not None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value
