"""`vllm-ms new-model NAME --like qwen2`: a new architecture to start from. Nothing is ever overwritten."""

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "new-model",
        help="write a new architecture to start from",
        description="Copies the nearest model under new names, with its registration and its tests: into this "
        "repository if run in it, else as a package of its own that can be installed (docs/add_a_model.md).",
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="of the folder and module, such as starcoder2")
    add("--like", metavar="MODEL", required=True, help="folder of the model to copy: qwen2, llama, mixtral, ...")
    add(
        "--architecture",
        metavar="CLASS",
        help="as in config.json (default: transformers' for NAME, or NameForCausalLM)",
    )
    add("--folder", metavar="DIR", help="where to write (default: this repository, or NAME here)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from vllm_ms_models.cli.new_model.command import new_model

    new_model(options.name, options.like, options.architecture, options.folder)
