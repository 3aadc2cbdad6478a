"""The command `vllm-ms`: what is done with models apart from serving them, which is `vllm serve`."""

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """Every subcommand with its options; a subcommand's function is in `run`."""
    from vllm_ms_models.cli import listing, quantize

    top = argparse.ArgumentParser(prog="vllm-ms", description="Tools for models that vLLM serves with MindSpore.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing.add_to(commands)
    quantize.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0; 1 when the command failed, which one sentence on stderr explains. Usage exits with 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words, argparse.Namespace(words=words))
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:  # CheckpointError is a ValueError
        print(f"vllm-ms {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm-ms {options.command}: interrupted.", file=sys.stderr)
        return 130
    return 0
