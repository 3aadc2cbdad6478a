"""Where RoBERTa's positions begin."""

from typing import Any


def first_position(config: Any) -> int:
    """The row of the table of positions that a sequence's first token has; ValueError without `pad_token_id`.

    Those before it are the padding's, and none's: the rows that are left are the longest sequence.
    """
    if config.pad_token_id is None:
        raise ValueError("config.json has no pad_token_id, behind which the positions begin; add it (1 for RoBERTa).")
    return int(config.pad_token_id) + 1
