"""The experts of transformers' models as linears of their own, under the names that checkpoints have for them."""

from typing import Any

import torch


class Expert(torch.nn.Module):
    """One expert of the fused 3D parameters."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(torch.nn.ModuleList):
    """What transformers calls with the router's choice."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, choice = torch.where(ids == number)
            if len(token):
                weighted = expert(x[token]) * shares[token, choice, None]
                result.index_add_(0, token, weighted.to(x.dtype))
        return result


def take_apart(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, whose blocks of fused experts were replaced."""
    for module in model.modules():
        fused: Any = getattr(module, "experts", None)
        if hasattr(fused, "gate_up_proj") and not hasattr(fused, "gate_up_proj_bias"):  # gpt-oss keeps them
            pairs = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
            module.experts = Experts([Expert(gate_up, down) for gate_up, down in pairs])
    return model
