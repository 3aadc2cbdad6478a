"""`python -m tests.soak`: a real server under load for half an hour. The exit code is 1 if anything went wrong."""

import argparse
import sys

from tests.soak.soaking import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A real server under load.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=int, default=3, help="how many to switch between; two at most are loaded")
    options = parser.parse_args()
    report = soak(options.minutes * 60, options.clients, options.adapters, options.seed)
    print(report.table())
    problems = report.problems()
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
