"""The one exception of this package, and how names appear in its sentences."""

from collections.abc import Collection
from itertools import islice

LONGEST_NAME = 160
MOST_NAMES = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: one sentence with what was expected, what was found and what to do."""


def quote(name: object) -> str:
    """A name out of a file, safe to print: control characters escaped, cut when absurdly long."""
    try:
        text = repr(name[: LONGEST_NAME + 1] if isinstance(name, str) else name)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "..."


def enumerate_names(names: Collection[str]) -> str:
    """The first few of `names`, quoted, and how many more there are."""
    listed = ", ".join(quote(name) for name in islice(names, MOST_NAMES))
    more = len(names) - MOST_NAMES
    return f"{listed} and {more} more" if more > 0 else listed
