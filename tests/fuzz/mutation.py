"""Random JSON and random damage, all from one seeded generator, so that an input can be made again from its number."""

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 4, 7, 8, 15, 16, 17, 64, 127, 255, 256, 512, 1000),
    *(2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64 - 1, 2**64, 10**30),
    *(10**308, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 2.0, 16.0, 1e-308, 5e-324, 1e-9, 1e9, 1e30, 1e308, -1e308),
)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *("", " ", "a", "Linear", "None", "none", "null", "true", "0", "1", "-1", "1e3", "٣", "²", "9" * 5000, "x" * 70000),
    *(
        "\0",
        "\n",
        "\x1b[31m",
        "\u202e",
        "\ufeff",
        "é",
        "😀",
        "\ud800",
        "\udfff",
        "a\ud83d",
        "%s%n",
        "{}",
        "{0.__class__}",
    ),
    *("../x", "/etc/passwd", "..", ".", "a.b", "re:", "re:.*", "re:((", "re:[", "re:a{9999999999}", "re:(?P<a>", "-:x"),
    *("re:" + "(" * 150 + ")" * 150, "re:\\", "$(id)", "__class__", "rope_type", "FLOAT", "W8A8"),
)


def number(rng: Random, finite: bool = False) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randint(-20, 300)
    if kind == 1:
        return rng.uniform(-3, 3)
    if kind == 2:
        return rng.getrandbits(rng.randint(1, 80)) * rng.choice((1, -1))
    if kind == 3 and not finite:
        return rng.choice(NOT_FINITE)
    return rng.choice(NUMBERS)


def text(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randint(0, 12)))


def value(rng: Random, depth: int = 3) -> Any:
    """Any JSON value, NaN and lone surrogates among them."""
    kind = rng.randrange(9 if depth else 7)
    if kind < 3:
        return number(rng)
    if kind < 5:
        return text(rng)
    if kind < 7:
        return rng.choice((None, True, False, [], {}))
    if kind == 7:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    return {text(rng): value(rng, depth - 1) for _ in range(rng.randint(0, 4))}


def nested(rng: Random) -> Any:
    """A value that is deep, but not too deep to be written."""
    found: Any = value(rng, 0)
    for _ in range(rng.choice((5, 50, 400))):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def tree(rng: Random, base: Any, words: Sequence[Any], most: int = 4) -> Any:
    """A copy of `base` with one to `most` changes anywhere in it; `words` are values that mean something there."""
    result = copy.deepcopy(base)
    for _ in range(rng.randint(1, most)):
        result = _changed(rng, result, words)
    return result


def _changed(rng: Random, base: Any, words: Sequence[Any]) -> Any:
    places = list(_places(base))
    if not places or rng.random() < 0.01:
        return _replacement(rng, base, words)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        name = str(rng.choice([*words, text(rng)])) if rng.random() < 0.8 else str(key) + "_"
        holder[name] = copy.deepcopy(holder[key])
    elif kind == 2:  # what is said elsewhere
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
    else:
        holder[key] = _replacement(rng, holder[key], words)
    return base


def _places(base: Any) -> "list[tuple[Any, Any]]":
    found: list[tuple[Any, Any]] = []
    waiting = [base]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, inner in items:
            found.append((holder, key))
            waiting.append(inner)
    return found


def _replacement(rng: Random, old: Any, words: Sequence[Any]) -> Any:
    kind = rng.randrange(10)
    if kind < 4 and words:
        return copy.deepcopy(rng.choice(words))
    if kind == 4:
        return [old]
    if kind == 5 and isinstance(old, int | float):
        return rng.choice((str(old), float(old) if abs(old) < 1e300 else old, -old, old + 1, old * 2, bool(old)))
    if kind == 6 and rng.random() < 0.1:
        return nested(rng)
    return value(rng)


def damaged(rng: Random, content: bytes, most: int = 4) -> bytes:
    """`content` with one to `most` pieces changed, cut out, repeated or put in."""
    result = bytearray(content)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(result) + 1)
        kind = rng.randrange(6)
        if kind < 2 and place < len(result):
            result[place] = rng.randrange(256)
        elif kind == 2 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            del result[place : place + rng.randint(1, 9)]
        elif kind == 4:
            result[place:place] = rng.randbytes(rng.randint(1, 9))
        else:
            result[place:place] = result[place : place + rng.randint(1, 30)]
    return bytes(result)


def written(tree: Any) -> bytes:
    """JSON as a hostile writer has it: NaN, surrogates and all; empty where Python cannot write it."""
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return b""


Check = Callable[[Random], str]
"""One input: what became of it, in a word that is counted. AssertionError for a fault."""
