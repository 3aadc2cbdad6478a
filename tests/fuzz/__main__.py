"""`python -m tests.fuzz`: hostile input in bulk, by target; the same inputs again for the same seed.

A fault ends its target and is printed with the number of its input: `--targets NAME --first NUMBER --inputs 1` makes
that input again. The exit code is 1 if there was one.
"""

import argparse
import sys
import time

from tests.fuzz.targets import AT_ONCE, BULK, TARGETS, run

INPUTS = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input in bulk.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"for each target (default {INPUTS})")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = 0
    print(f"{'target':<14}{'inputs':>9}{'seconds':>9}  what became of them", flush=True)
    for name in options.targets:
        start = time.monotonic()
        result = run(name, options.inputs, options.seed, options.first)
        counts = ", ".join(f"{word} {count}" for word, count in sorted(result.counts.items()))
        inputs = sum(result.counts.values())
        print(f"{name:<14}{inputs:>9}{time.monotonic() - start:>9.0f}  {counts}", flush=True)
        if result.fault is not None:
            faults += 1
            size = f"--inputs {BULK if name in AT_ONCE else 1}"
            print(f"FAULT at input {result.at}: --targets {name} --seed {options.seed} --first {result.at} {size}")
            print(result.fault, flush=True)
    print("no faults" if not faults else f"{faults} targets with faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
