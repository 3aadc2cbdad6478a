"""How tokens choose experts: what models say and kernels do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Routing:
    """How each token chooses `top_k` of its experts from their logits, and what share each of them has.

    Scores are the logits' `scoring`: "softmax" over all experts, or "sigmoid" of each. An expert's rank is its score,
    plus a bias where one is given. With `groups` > 1, neighbouring experts form so many groups of one size; a group's
    rank is the largest of its experts' ("max") or the sum of its two largest ("top2"), and only experts of the
    `top_groups` best groups are chosen. Of equal ranks the first is better.

    Shares are the scores of the chosen experts, without the bias; divided by their sum (+ 1e-20) if `renormalize`;
    times `scale`. Raises ValueError for what cannot be.
    """

    top_k: int
    renormalize: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_rank: Literal["max", "top2"] = "max"

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"Experts cannot be scored by {self.scoring!r}; softmax and sigmoid are supported.")
        if self.group_rank not in ("max", "top2"):
            raise ValueError(f"Groups of experts cannot be ranked by {self.group_rank!r}; max and top2 are supported.")
        if self.top_k < 1 or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"{self.top_k} experts of {self.top_groups} of {self.groups} groups cannot be chosen: at least one "
                "expert is needed, and at least one group of those that there are."
            )

    def check(self, num_experts: int) -> None:
        """ValueError unless there are so many groups and experts to choose from."""
        size = num_experts // self.groups
        if num_experts % self.groups or size * self.top_groups < self.top_k or (self.group_rank == "top2" and size < 2):
            raise ValueError(
                f"{num_experts} experts in {self.groups} groups do not fit a choice of {self.top_k} experts from "
                f"{self.top_groups} groups ranked by {self.group_rank}; check config.json."
            )
