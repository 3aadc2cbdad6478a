"""Where two runs of a prompt part."""

from dataclasses import dataclass

import torch

from vllm_ms_models.cli.verify.runs import Run

# How far apart a token's hidden states may be, as a share of their length, and the log-probabilities of any token.
# float32: sums in other orders give 1e-6 in a few layers, 1e-5 in many; an error of the model's gives 1e-2 and more. Of
# 16-bit models each layer rounds a dozen times, by 2^-9 or 2^-12 of a value: what many layers add up to is allowed.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


@dataclass(frozen=True)
class Station:
    """A layer's differences: the largest of one number, and the largest of a token's as a share of its length."""

    name: str
    largest: float
    relative: float
    token: int


@dataclass(frozen=True)
class Parting:
    """The first token that is chosen differently: number `step`, with both tokens' log-probabilities in both models."""

    step: int
    ours: int
    theirs: int
    our_logprobs: tuple[float, float]
    their_logprobs: tuple[float, float]
    tie: bool


@dataclass(frozen=True)
class Comparison:
    """Of one prompt of `length` tokens."""

    length: int
    tokens: list[int]
    stations: list[Station]
    logprobs: float
    parting: Parting | None
    tolerance: float
    logprob_tolerance: float

    @property
    def first(self) -> Station | None:
        """The first layer that is beyond the tolerance."""
        return next((one for one in self.stations if not one.relative <= self.tolerance), None)

    @property
    def equal(self) -> bool:
        """Layers and log-probabilities are within the tolerances, and tokens are the same but for ties."""
        apart = self.parting is not None and not self.parting.tie
        return self.first is None and self.logprobs <= self.logprob_tolerance and not apart


def compare(length: int, ours: Run, theirs: Run, tolerance: float, logprob_tolerance: float) -> Comparison:
    """`theirs` has the same tokens before it wherever it chooses one."""
    stations = [
        _station(name, ours.stations[name], other) for name, other in theirs.stations.items() if name in ours.stations
    ]
    apart = (ours.logprobs - theirs.logprobs).abs().max().item()
    parting = None
    for step, (our, their) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        if our != their:
            mine, other = ((run.logprobs[step, our].item(), run.logprobs[step, their].item()) for run in (ours, theirs))
            # Each of the four numbers may be off by the tolerance.
            tie = (mine[0] - mine[1]) + (other[1] - other[0]) <= 2 * logprob_tolerance
            parting = Parting(step, our, their, mine, other, tie)
            if not tie:
                break
    return Comparison(length, ours.tokens, stations, apart, parting, tolerance, logprob_tolerance)


def _station(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Station:
    if ours.shape != theirs.shape:
        return Station(name, float("inf"), float("inf"), 0)
    apart = ours - theirs
    shares = apart.norm(dim=-1) / theirs.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    worst = int(shares.nan_to_num(torch.inf).argmax())
    return Station(name, apart.abs().max().item(), shares[worst].item(), worst)
