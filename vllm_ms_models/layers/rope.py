"""Rotary position embedding: what a Hugging Face config says about it, and the cos | sin table it stands for.

The table is fixed when the server starts. In transformers two rope types depend on the sequence at hand instead:
dynamic and longrope change all frequencies once it outgrows the length of the original training. In a paged cache,
which sequences share, keys are not rotated anew, so the choice falls once, by `max_model_len`, as in vLLM:

* `max_model_len <= original`: the unscaled (dynamic) or short (longrope) frequencies. Equal to transformers for every
  sequence.
* `max_model_len > original`, dynamic: the base of a sequence of `max_model_len` tokens, for every sequence. Equal to
  transformers for a prompt of exactly that length only. It is the formula of vLLM's `DynamicNTKScalingRotaryEmbedding`
  where that is told `max_trained_positions`; it is not for Llama and Qwen2, whose table then ends at `original`.
* `max_model_len > original`, longrope: the long frequencies, for every sequence, as vLLM's
  `Phi3LongRoPEScaledRotaryEmbedding`. Equal to transformers for prompts longer than `original`; a shorter one has the
  short frequencies there.

Other types are the same at every length. Attention scaling is always that of transformers; vLLM's differs for a
longrope config that sets `factor` or `attention_factor`, which vLLM does not read.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vllm_ms_models.checkpoint.errors import enumerate_names, quote

Array = NDArray[np.float32]

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0  # RotaryEmbeddingConfigMixin.default_theta of transformers
MOST_FEATURES = 65536  # of a head: no model comes near, and a config's number is not to decide about memory
_LEAST_FACTOR = 1e-30  # longrope divides by it, and positions times the quotient are float32
_TINY, _HUGE = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_ORIGINAL = "original_max_position_embeddings"

# Parameters that change the rotation for some model and are not implemented: an error, never ignored.
_UNSUPPORTED = (
    "alpha", "long_mscale", "max_trained_positions", "mixed_b", "mrope_interleaved", "rope_dim", "short_mscale",
    "use_fope",
)  # fmt: skip

# "su" is the first name of longrope; "mrope" says of the default type that there are sections.
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}

# Where vLLM looks for a model's length; the smallest counts (ModelArchConfigConvertorBase).
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip


@dataclass(frozen=True)
class RopeParameters:
    """One rotary embedding, with everything that a config may leave out resolved.

    `rotary_dim` is the d of the formulas. `attention_scaling` is multiplied into cos and sin. The other fields with a
    default matter only to the rope types named beside them.
    """

    rope_type: str
    head_dim: int
    rotary_dim: int
    theta: float
    attention_scaling: float = 1.0
    factor: float = 1.0  # all but default
    original_max_position: int = 0  # dynamic, llama3, yarn, longrope: length of the original training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope
    mscale_all_dim: float = 0.0  # all but default: DeepSeek's, see `softmax_factor`
    sections: tuple[int, ...] = ()  # pairs that rotate by a token's temporal position, by its row, by its column, ...

    @property
    def rotary_size(self) -> int:
        """Features of a head that rotate: `rotary_dim`, rounded up to an even number as transformers does."""
        return self.rotary_dim + self.rotary_dim % 2

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the softmax scale by: (0.1 mscale_all_dim ln(factor) + 1)^2.

        As `yarn_apply_mscale` of transformers' DeepSeek models: 1 unless the rope is scaled and `mscale_all_dim` given.
        """
        return (0.1 * self.mscale_all_dim * math.log(max(self.factor, 1.0)) + 1.0) ** 2

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> "RopeParameters":
        """Parse a config object, or a config.json as a mapping, that says `rope_parameters` or `rope_scaling`.

        `layer_type` selects from nested `rope_parameters`; flat ones hold for every layer type. What takes precedence
        is as in transformers (`convert_rope_params_to_dict`, `standardize_rope_params`). ValueError if unsupported.
        """
        values = _rope_values(config, layer_type)
        read = _Reader(_rope_type(values), values, config)
        for key in _UNSUPPORTED:
            if values.get(key):
                read.fail(key, "absent (it is not supported)", values[key])
        head_dim, partial = read.head_dim(), read.number("partial_rotary_factor", above=0, default=1.0)
        rotary_dim = int(head_dim * partial)
        smallest = 4 if read.rope_type == "dynamic" else 2  # its exponent is d / (d - 2)
        if not smallest <= rotary_dim + rotary_dim % 2 <= head_dim:
            read.fail("partial_rotary_factor", f"such that {smallest} to {head_dim} features rotate, in pairs", partial)
        theta = read.number("rope_theta", above=1, default=DEFAULT_THETA)
        pairs = (rotary_dim + 1) // 2
        fields = _type_fields(read, pairs) | {"sections": read.sections(pairs)}
        return cls(read.rope_type, head_dim, rotary_dim, theta, **fields)


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _rope_values(config: Any, layer_type: str | None) -> dict[str, Any]:
    """The rope's own entries, with what older configs keep beside them."""
    found = _get(config, "rope_scaling") or _get(config, "rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"rope_parameters (or rope_scaling) must be a mapping, but the config has {quote(found)}")
    nested = {name: entry for name, entry in found.items() if isinstance(entry, Mapping)}
    if nested and layer_type not in nested:
        names = enumerate_names(nested)
        raise ValueError(f"rope_parameters must have an entry for layer type {layer_type!r}, but they have {names}")
    values = dict(nested.get(layer_type, found))
    if not nested and (original := _get(config, _ORIGINAL)) is not None:
        values[_ORIGINAL] = original  # Phi-3 keeps it there, and there it takes precedence
    for key in ("rope_theta", "partial_rotary_factor"):
        if values.get(key) is None:
            values[key] = _get(config, key)
    return values


def _rope_type(values: Mapping[str, Any]) -> str:
    """`rope_type` or, in older configs, `type`."""
    found = [values[key] for key in ("rope_type", "type") if values.get(key) is not None] or ["default"]
    names = [_OTHER_NAMES.get(name, name) if isinstance(name, str) else name for name in found]
    if names[0] != names[-1]:
        raise ValueError(f"rope_type and type must agree, but the config has {quote(names[0])} and {quote(names[-1])}")
    if names[0] not in SUPPORTED:
        raise ValueError(f"rope type {quote(names[0])} is not supported; supported are {', '.join(SUPPORTED)}")
    return str(names[0])


class _Reader(NamedTuple):
    """Typed access to a rope's `values` and to the `config` around them; every complaint is one sentence."""

    rope_type: str
    values: Mapping[str, Any]
    config: Any

    def fail(self, key: str, expected: str, found: object) -> NoReturn:
        raise ValueError(
            f"rope type {self.rope_type!r}: {key} must be {expected}, but the config has "
            f"{'no value for it' if found is None else quote(found)} (supported rope types: {', '.join(SUPPORTED)})"
        )

    def number(self, key: str, least: float = 0.0, above: float | None = None, default: float | None = None) -> float:
        """A finite number within its bound; `default`, if there is one, where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not _is_number(value) or not (value >= least if above is None else value > above):
            self.fail(key, f"a number of at least {least:g}" if above is None else f"a number above {above:g}", value)
        return float(value)

    def whole(self, key: str, source: Any, most: int | None = None) -> int:
        value = _get(source, key)
        if not _is_number(value) or value != int(value) or not 1 <= value <= (most or value):
            self.fail(key, "a whole number of at least 1" if most is None else f"a whole number of 1 to {most}", value)
        return int(value)

    def head_dim(self) -> int:
        """`head_dim`, the rotating part of a DeepSeek head, or hidden_size / num_attention_heads."""
        for key in ("head_dim", "qk_rope_head_dim"):
            if _get(self.config, key) is not None:
                return self.whole(key, self.config, MOST_FEATURES)
        size = self.whole("hidden_size", self.config) // self.whole("num_attention_heads", self.config)
        if not 1 <= size <= MOST_FEATURES:
            self.fail("hidden_size / num_attention_heads", f"1 to {MOST_FEATURES}", size)
        return size

    def factors(self, key: str, pairs: int) -> tuple[float, ...]:
        found = self.values.get(key)
        if not isinstance(found, list | tuple) or not all(
            _is_number(entry) and entry >= _LEAST_FACTOR for entry in found
        ):
            self.fail(key, "a list of numbers above 0", found)
        if len(found) != pairs:
            self.fail(key, f"a list of {pairs} numbers (half the rotating features), not {len(found)}", found)
        return tuple(map(float, found))

    def sections(self, pairs: int) -> tuple[int, ...]:
        """Of M-RoPE (Qwen2-VL, arXiv:2409.12191): () without it."""
        found = self.values.get("mrope_section")
        if found is None:
            return ()
        whole = isinstance(found, list | tuple) and all(_is_number(n) and n == int(n) and n >= 0 for n in found)
        if not whole or sum(found) != pairs:
            self.fail("mrope_section", f"a list of whole numbers that add up to {pairs} (half the features)", found)
        return tuple(map(int, found))


def _is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that a float32 can hold: JSON has integers of any size, and Python reads NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or _TINY <= abs(value) <= _HUGE


def _type_fields(read: _Reader, pairs: int) -> dict[str, Any]:
    """The fields of `RopeParameters` that depend on the rope type."""
    fields: dict[str, Any] = {}
    if read.rope_type in ("llama3", "yarn", "longrope") and read.values.get(_ORIGINAL) is not None:
        fields["original_max_position"] = original = read.whole(_ORIGINAL, read.values)
    elif read.rope_type not in ("default", "linear"):  # dynamic: always
        fields["original_max_position"] = original = read.whole("max_position_embeddings", read.config)
    if read.rope_type == "longrope":
        extension = max(1.0, read.whole("max_position_embeddings", read.config) / original)
        fields["factor"] = factor = read.number("factor", least=1, default=extension)
        fields |= {key: read.factors(key, pairs) for key in ("short_factor", "long_factor")}
        # arXiv:2402.13753 as released with Phi-3 (`_compute_longrope_parameters`)
        scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        fields["attention_scaling"] = read.number("attention_factor", default=scaling)
    elif read.rope_type != "default":
        fields["factor"] = factor = read.number("factor", least=1)
    if read.rope_type == "llama3":
        fields["low_freq_factor"] = low = read.number("low_freq_factor", above=0)
        fields["high_freq_factor"] = read.number("high_freq_factor", above=low)
    elif read.rope_type == "yarn":
        fields["beta_slow"] = slow = read.number("beta_slow", above=0, default=1.0)
        fields["beta_fast"] = read.number("beta_fast", least=slow, default=32.0)
        fields["truncate"] = truncate = read.values.get("truncate") in (None, True)
        if not truncate and read.values["truncate"] is not False:
            read.fail("truncate", "true or false", read.values["truncate"])
        fields["attention_scaling"] = read.number("attention_factor", default=_yarn_scaling(read, factor))
    if read.rope_type != "default":
        fields["mscale_all_dim"] = read.number("mscale_all_dim", default=0.0)
    return fields


def _yarn_scaling(read: _Reader, factor: float) -> float:
    """0.1 ln(factor) + 1 (YaRN, arXiv:2309.00071, section 3.4); DeepSeek puts mscale before the logarithm and divides
    by the same with mscale_all_dim (`_compute_yarn_parameters`)."""
    both = tuple(read.number(key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    mscale, mscale_all = both if all(both) else (1.0, 0.0)
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * mscale_all * math.log(factor) + 1.0)


def covered_positions(parameters: RopeParameters | Iterable[RopeParameters], config: Any) -> int:
    """How many positions the config's rope covers (the widest of several, one for each layer type).

    Never less than what vLLM derives (`_get_and_verify_max_len`): the config's length, times `factor` for linear and
    dynamic except in Gemma 3, whose length is scaled already. Equal to it but for yarn: there a config may keep the
    unscaled length (Qwen2.5), and the rope is made for original * factor, which vLLM refuses unless overridden.
    """
    names = ["model_max_length"] if _get(config, "model_max_length") is not None else _LENGTHS  # the one is Cohere's
    lengths = [_length(config, key) for key in names if _get(config, key) is not None]
    if not lengths:
        raise ValueError("max_position_embeddings must be in the config, but neither it nor another length is")
    covered = [min(lengths)]
    for rope in [parameters] if isinstance(parameters, RopeParameters) else parameters:
        if rope.rope_type == "yarn":
            covered.append(rope.original_max_position * rope.factor)
        elif rope.rope_type in ("linear", "dynamic") and "gemma3" not in str(_get(config, "model_type")):
            covered.append(min(lengths) * rope.factor)
    return int(max(covered))


def _length(config: Any, key: str) -> float:
    value = _get(config, key)
    if not _is_number(value) or value < 1:
        raise ValueError(f"{key} must be a number of at least 1, but the config has {quote(value)}")
    return value


# At position 100,000, one unit in the last place of a float32 frequency turns the angle by 0.006. So transformers'
# float32 is followed step by step, with position * frequency rounded, too: measured below position 131,072 (theta 1e6),
# cos is then within 6e-8 of torch's; it is 4e-3 off with angles in float64, 9e-3 with frequencies in float64 as well.
# Only functions are taken in float64 and rounded. Of torch's float32 powers 1.3 % differ from that by a unit (torch's
# vectorized and scalar code differ as much from each other) and 18 % from NumPy's; of its cosines, 5 % and 16 %.


def inverse_frequencies(parameters: RopeParameters, max_model_len: int) -> Array:
    """Radians per position for each pair of features: float32 `[rotary_size / 2]`."""
    p, theta = parameters, parameters.theta
    if p.rope_type == "dynamic":  # NTK-aware base, `_compute_dynamic_ntk_parameters`
        stretch = p.factor * max(max_model_len, p.original_max_position) / p.original_max_position - (p.factor - 1)
        theta *= stretch ** (p.rotary_dim / (p.rotary_dim - 2))
    exponents = (np.arange(0, p.rotary_dim, 2, dtype=np.float32) / np.float32(p.rotary_dim)).astype(np.float64)
    powers: Array = np.power(np.float64(np.float32(theta)), exponents).astype(np.float32)
    if p.rope_type == "longrope":  # a factor for each pair, arXiv:2402.13753
        powers *= np.array(p.long_factor if max_model_len > p.original_max_position else p.short_factor, np.float32)
    frequencies = np.float32(1) / powers
    if p.rope_type == "linear":  # position interpolation, arXiv:2306.15595
        frequencies /= np.float32(p.factor)
    elif p.rope_type == "llama3":
        frequencies = _llama3(frequencies, p)
    elif p.rope_type == "yarn":
        kept = _yarn_kept(p)
        frequencies = 1 / (np.float32(p.factor) * powers) * (1 - kept) + frequencies * kept
    return frequencies


def _llama3(frequencies: Array, p: RopeParameters) -> Array:
    """Llama 3.1 (`_compute_llama3_parameters`): long waves slow down by `factor`, short ones stay, a blend between.
    torch divides a number by a tensor as reciprocal times number; hence the products with `1 / ...`."""
    lengths = 1 / frequencies * np.float32(2 * math.pi)
    rotations = 1 / lengths * np.float32(p.original_max_position)
    blend = (rotations - np.float32(p.low_freq_factor)) / np.float32(p.high_freq_factor - p.low_freq_factor)
    slowed = frequencies / np.float32(p.factor)
    blended = (1 - blend) * frequencies / np.float32(p.factor) + blend * frequencies
    result = np.where(lengths < np.float32(p.original_max_position / p.high_freq_factor), frequencies, blended)
    return np.where(lengths > np.float32(p.original_max_position / p.low_freq_factor), slowed, result)


def _yarn_kept(p: RopeParameters) -> Array:
    """The unscaled frequency's share in YaRN "by parts" (arXiv:2309.00071, section 3.2; `_compute_yarn_parameters`):
    1 for pairs that turn `beta_fast` times within the original length, 0 for `beta_slow`, a linear ramp between."""
    ends = [p.original_max_position / (turns * 2 * math.pi) for turns in (p.beta_fast, p.beta_slow)]
    low, high = (p.rotary_dim * math.log(end) / (2 * math.log(p.theta)) for end in ends)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.rotary_dim - 1)
    pair = np.arange((p.rotary_dim + 1) // 2, dtype=np.float32)
    return 1 - np.clip((pair - np.float32(low)) / np.float32(high - low if high != low else 0.001), 0, 1)


def cos_sin_table(parameters: RopeParameters, max_position: int, max_model_len: int | None = None) -> Array:
    """cos | sin of positions 0 ... max_position - 1 with attention scaling: float32 `[max_position, rotary_size]`.

    `max_model_len` (default: `max_position`) is the longest sequence served: see the head of this file.
    """
    frequencies = inverse_frequencies(parameters, max_position if max_model_len is None else max_model_len)
    table = np.empty((max_position, parameters.rotary_size), np.float32)
    step = 8192  # rows at a time, to bound the float64 intermediates
    for first in range(0, max_position, step):
        rows = table[first : first + step]
        _fill(rows, np.arange(first, first + len(rows), dtype=np.float32)[:, None] * frequencies, parameters)
    return table


def cos_sin_rows(parameters: RopeParameters, frequencies: Array, positions: NDArray[np.int64]) -> Array:
    """As `cos_sin_table`, of tokens with several positions each: `[dimensions, tokens]` -> `[tokens, rotary_size]`.

    Section i of the pairs rotates by position i, or i - 3 and so on: transformers' `recomposition_frequencies`.
    """
    sections = parameters.sections
    dimension = np.repeat(np.arange(len(sections)) % len(positions), sections)
    rows = np.empty((positions.shape[1], parameters.rotary_size), np.float32)
    _fill(rows, positions.astype(np.float32)[dimension].T * frequencies, parameters)
    return rows


def _fill(rows: Array, angles: Array, parameters: RopeParameters) -> None:
    half, exact = angles.shape[1], angles.astype(np.float64)
    rows[:, :half], rows[:, half:] = np.cos(exact), np.sin(exact)
    np.multiply(rows, np.float32(parameters.attention_scaling), out=rows)
