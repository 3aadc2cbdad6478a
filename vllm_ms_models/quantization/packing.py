"""Small integers out of packed int32 words, in NumPy."""

import numpy as np

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word holds column 0, 1, 2... of eight (the fields hold columns 0, 2, 4, 6, 1, 3, 5, 7)."""


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned fields of int32 words, lowest bits first: `[rows, words]` -> uint8 `[rows, words * 32 / bits]`."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return data
    fields = np.empty((data.shape[0], data.shape[1] * 2), np.uint8)
    np.bitwise_and(data, 15, out=fields[:, 0::2])
    np.right_shift(data, 4, out=fields[:, 1::2])
    return fields


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """As `unpack` of 4 bits, with the columns of each word in AWQ's order."""
    fields = unpack(words, 4)
    return fields.reshape(len(fields), -1, 8)[:, :, AWQ_ORDER].reshape(fields.shape)


def centred(fields: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned fields less `2 ** (bits - 1)`, as int8."""
    return (fields ^ np.uint8(128)).view(np.int8) if bits == 8 else fields.view(np.int8) - np.int8(8)


def words_of(part: slice, per_word: int) -> tuple[slice, slice]:
    """The words that hold fields `part`, and where the fields lie in those words."""
    first, last = part.start // per_word, -(-part.stop // per_word)
    skipped = part.start - first * per_word
    return slice(first, last), slice(skipped, skipped + part.stop - part.start)
