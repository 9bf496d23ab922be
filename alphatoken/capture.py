"""Inputs of scored linears and the gradient of the summed loss with respect to their outputs.

The graph starts at the first scored linear: everything below runs without one, and gradients are asked for outputs of
linears only, never for weights. Nothing stays on the model: hooks live as long as the context.

B rows, T positions, N response tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from alphatoken.architecture import ScoredLinear
from alphatoken.attention import AttentionInputs, recording
from alphatoken.batching import Batch
from alphatoken.errors import UserError
from alphatoken.model import ScoringModel
from alphatoken.response_backward import response_backward


@dataclass
class Captured:
    """One batch, run forward and back through the scored layers."""

    inputs: dict[str, torch.Tensor]  # parameter name -> h, BT(d_in)
    deltas: dict[str, torch.Tensor]  # parameter name -> d(sum of weighted losses)/d(output), BT(d_out)
    attention: dict[int, AttentionInputs]  # layer -> its queries and keys
    losses: torch.Tensor  # N
    hidden: torch.Tensor  # ND, final hidden states at the predicting positions


def by_position(found: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """What modules saw, as BT(d): some get rows and positions as one dimension (OPT, shared experts).

    Raises:
        UserError: one saw something else, so that nothing says which position a number is of.
    """
    shape = batch.input_ids.shape
    result = {}
    for name, tensor in found.items():
        flat = tensor.dim() == 2 and len(tensor) == shape.numel()
        result[name] = tensor.reshape(*shape, -1) if flat else tensor
        if result[name].shape[:-1] != shape:
            raise UserError(
                f"{name} works on tensors of shape {tuple(tensor.shape)}, not on rows and positions, so its tokens "
                "cannot be told apart; use --estimator exact and --positions all, or leave it out by --parameters"
            )
    return result


@contextmanager
def capturing(linears: list[ScoredLinear]) -> Iterator[tuple[dict, dict]]:
    """Fills (inputs, outputs) by parameter name. Starts the graph at the first of them that has none yet."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def hook_for(name: str):
        def hook(module, args, output):
            inputs[name] = args[0].detach()
            outputs[name] = output if output.requires_grad else output.requires_grad_()
            return outputs[name]

        return hook

    handles = [linear.module.register_forward_hook(hook_for(linear.name)) for linear in linears]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def capture(
    scoring: ScoringModel,
    batch: Batch,
    linears: list[ScoredLinear],
    *,
    attention_layers: frozenset[int] = frozenset(),
    token_weights: torch.Tensor | None = None,
    responses_only: bool = False,
    positions_matter: bool = True,
) -> Captured:
    """Run one batch. `token_weights` (N) scales each token's loss; losses are summed, never averaged.

    responses_only: deltas are right from a row's first predicting position to its last, and cost less.
    positions_matter: inputs and deltas are BT(d). Else they may be flat, whatever a module works on.

    Raises:
        UserError: a scored linear, or the attention of a layer in `attention_layers`, did not run, or not by positions.
    """
    first = min(linear.layer for linear in linears)
    narrow = response_backward(scoring, batch, first) if responses_only else nullcontext()
    with (
        torch.enable_grad(),
        narrow,
        capturing(linears) as (inputs, outputs),
        recording(set(attention_layers)) as attention,
    ):
        predicting = scoring.predicting_states(batch)
    check_all_ran(linears, outputs, attention_layers, attention)
    head = scoring.head(predicting.detach(), batch.targets, gradient=True)
    gradient = head.hidden_gradient
    assert gradient is not None
    if token_weights is not None:
        gradient = gradient * token_weights[:, None].to(gradient.dtype)
    names = [linear.name for linear in linears]
    found = torch.autograd.grad(predicting, [outputs[name] for name in names], gradient)
    deltas = dict(zip(names, found, strict=True))
    if positions_matter:
        inputs, deltas = by_position(inputs, batch), by_position(deltas, batch)
    return Captured(inputs, deltas, attention, head.losses, predicting.detach())


def check_all_ran(linears, outputs, attention_layers, attention) -> None:
    for linear in linears:
        if linear.name not in outputs:
            raise UserError(f"{linear.name} did not run in the forward pass, so it cannot be scored")
    for layer in sorted(attention_layers - attention.keys()):
        raise UserError(
            f"layer {layer} does not use transformers' attention interface, which value_propagation reads attention "
            "from; use --estimator exact"
        )
