"""`vllm-ms doctor [MODEL]`: what there is here, and whether a checkpoint would load, before anything is loaded."""

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="whether this installation works, and whether a model would load",
        usage="vllm-ms doctor [-h] [--json] [MODEL [any option of vllm serve ...]]",
        description="Looks at this machine and installation and, from config.json and the headers of the weights, at "
        "a model. With options of `vllm serve`, such as --tensor-parallel-size 2, --dtype, --max-model-len or "
        "--max-num-seqs, it says what that command would do. Exits with 1 if anything would be refused.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hugging Face id")
    parser.add_argument("--json", action="store_true", help="everything found, as JSON")
    parser.set_defaults(run=lambda options: _run(parser, options), takes_rest=True)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.rest and (options.model is None or options.model.startswith("-")):
        parser.error("options of vllm serve belong to a model: name it first.")
    from vllm_ms_models.cli.doctor.command import doctor

    return doctor(options.model, options.rest, options.json)
