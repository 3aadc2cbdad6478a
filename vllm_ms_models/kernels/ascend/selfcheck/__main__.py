"""The command: a line for each operator and dtype; exit code 1 if one is wrong or fails."""

import argparse
from collections import Counter

from vllm_ms_models import devices
from vllm_ms_models.kernels.ascend.selfcheck.process import Process
from vllm_ms_models.kernels.ascend.selfcheck.runs import BAD, checks, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ms_models.kernels.ascend.selfcheck",
        description="Runs each operator of the Ascend back end once, on tiny inputs, against what it means in NumPy.",
    )
    parser.add_argument(
        "--device", choices=("auto", "ascend", "cpu"), default="auto", help="auto: Ascend, if there is one"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="operators whose name contains TEXT")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds for an operator, compiling included"
    )
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)  # in the process that runs them
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "ascend" if devices.visible() else "cpu"
    if options.first is not None:
        run(device, options.only, options.first)
        return 0
    counts: Counter[str] = Counter()
    for line in checks(lambda first: Process(device, options.only, first), options.timeout):
        print(line, flush=True)
        counts[line.status] += 1
    print(f"on {device}: " + (", ".join(f"{n} {status}" for status, n in counts.items())))
    return 1 if counts.keys() & BAD else 0


if __name__ == "__main__":
    raise SystemExit(main())
