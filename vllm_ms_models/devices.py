"""The Ascend devices of this host that this process may use, by the driver's files. **Not run on hardware.**

No MindSpore here: the platform asks in every process of vLLM.
"""

import os
import re
from pathlib import Path

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"  # the runtime's own: numbers of devices, which count from 0 within the process


def installed() -> list[int]:
    """Numbers of the host's devices, ascending."""
    found = (re.fullmatch(r"davinci(\d+)", Path(path).name) for path in Path("/dev").glob("davinci[0-9]*"))
    return sorted(int(match[1]) for match in found if match)


def visible() -> list[int]:
    """Those of them that ASCEND_RT_VISIBLE_DEVICES leaves, in its order; ValueError if it does not name devices."""
    there = installed()
    text = os.environ.get(VISIBLE)
    if text is None or not there:
        return there
    try:
        chosen = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        chosen = [-1]
    if not set(chosen) <= set(there):
        raise ValueError(
            f"{VISIBLE}={text} does not name devices of this host, which has {', '.join(map(str, there))}; correct it."
        )
    return chosen


def check(number: int, ranks: int) -> None:
    """ValueError unless there is a device for rank `number` of `ranks` on this host."""
    found = visible()
    if number >= len(found):
        raise ValueError(
            f"{ranks} ranks on this host need as many Ascend devices, but only {len(found)} can be used "
            f"({VISIBLE}={os.environ.get(VISIBLE, 'unset')}); use fewer ranks, or let them see more devices."
        )
