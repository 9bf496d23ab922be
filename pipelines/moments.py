"""AdamW's second moments, from the optimizer of a running training."""

from typing import Any

import torch
from torch import nn

from alphatoken.architecture import scored_parameters
from alphatoken.errors import UserError

SECOND = "exp_avg_sq"


def moment_states(model: nn.Module, optimizer: Any, parameters: str) -> dict[str, dict] | None:
    """What the optimizer keeps for each scored weight, by name; None before its first step.

    Raises:
        UserError: it keeps no second moments. Without them nothing could be valued, however long the run.
    """
    named = dict(model.named_parameters())
    states = {name: optimizer.state.get(named[name], {}) for name in scored_parameters(model, parameters)}
    for state in states.values():
        if state and SECOND not in state:
            raise UserError(
                "--preconditioner adam needs an optimizer that keeps AdamW's second moments, this one keeps "
                f"{', '.join(sorted(state))}: give --optimizer adamw_torch_fused or --preconditioner none"
            )
    return states if all(states.values()) else None


def without_bias(state: dict, optimizer: Any) -> torch.Tensor:
    """The second moments of one weight, float32."""
    beta = optimizer.param_groups[0]["betas"][1]
    return state[SECOND].float() / (1 - beta ** float(state["step"]))
