"""The command `vllm-ms`: what is done with models apart from serving them, which is `vllm serve`."""

import argparse
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """Every subcommand with its options; a subcommand's function is in `run` and may return an exit code."""
    from vllm_ms_models.cli import doctor, listing, new_model, quantize, verify

    top = argparse.ArgumentParser(prog="vllm-ms", description="Tools for models that vLLM serves with MindSpore.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    listing.add_to(commands)
    doctor.add_to(commands)
    verify.add_to(commands)
    new_model.add_to(commands)
    quantize.add_to(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns what the command says, 0 or 1; 1 when it failed, which one sentence on stderr explains.

    Usage exits with 2. What a command that has `takes_rest` does not know is in `options.rest`: options of vLLM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    options, rest = top.parse_known_args(words, argparse.Namespace(words=words, rest=[]))
    if rest and not hasattr(options, "takes_rest"):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        code: int | None = options.run(options)
    except (ValueError, OSError, ImportError) as error:  # CheckpointError is a ValueError
        print(f"vllm-ms {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vllm-ms {options.command}: interrupted.", file=sys.stderr)
        return 130
    return code or 0
