"""The exact estimator: <grad l_t, M> of every response token at once, without a backward pass on training rows.

    forward   forward-mode AD: weights carry the tangent M, one forward pass gives every l_t and its derivative
    central   (l_t(W + eps M) - l_t(W - eps M)) / (2 eps): two plain forward passes, any kernel; float32 and wider

Only layers from the first scored one on pay: the trunk below has no tangent (forward) or is shared (central).
Adaptation is along the direction, stability along the drift. M may be any direction in any set of weights.

Several directions share the trunk. In forward mode they share the head's gradient too and, where there are several
targets, the layers' own forward pass (hidden_tangent.py): each adds a tangent pass, two of the three products. A
central difference has nothing more to share: each adds its own two passes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import nn

from alphatoken.architecture import decoder_layers, first_scored_layer
from alphatoken.batching import Batch
from alphatoken.direction import Tensors
from alphatoken.errors import UserError
from alphatoken.experts import FixedRouting, is_routed
from alphatoken.float8 import check_float8
from alphatoken.hidden_tangent import HiddenTangents, hidden_tangent, still_padding
from alphatoken.model import ScoringModel
from alphatoken.tangent_linear import products_of, wide_products
from alphatoken.targets import ADAPTATION, target_column
from alphatoken.trunk import Trunk
from alphatoken.values import Targets, TokenValues, adaptation_of, by_column

# Central steps that are tried, as shares of the weights' norm. Truncation grows with the step's square, rounding with
# its inverse, and where they meet differs by a factor of a thousand: a real model bends far more along its own gradient
# than a random one along a random direction.
RELATIVE_STEPS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
PROBE_TOKENS = 128


def choose_method(method: str, dtype: torch.dtype, tangent_dtype: str | None = None) -> str:
    """auto: central difference in float32, where it is precise enough and cheaper; else forward mode, as for tangents
    in a dtype of their own.

    Forward mode costs about three passes of the scored layers, central difference two and a second pass of the head
    (benchmarks/speed.py). bfloat16 rounds a small step away.

    Raises:
        UserError: central difference in bfloat16, or of what is asked for in forward mode.
    """
    if method == "central" and tangent_dtype:
        raise UserError(f"--tangent-dtype {tangent_dtype} is of forward mode; leave --method central out")
    if method == "central" and dtype not in (torch.float32, torch.float64):
        raise UserError("--method central needs --dtype float32: bfloat16 rounds the step away; use --method forward")
    if method != "auto":
        return method
    return "central" if dtype == torch.float32 and not tangent_dtype else "forward"


class Exact:
    """Exact values along `direction`, or several targets, and, where given, `drift` (all by parameter name).

    The value <grad l_t, M> of each response token t of a batch, to first order: what a step of gradient descent on
    l_t, at a learning rate of 1, takes off the validation loss, in nats, if M is the gradient of that. The paper
    estimates it otherwise (Eqs. 8 and 9): see ValuePropagation.

    Args:
        parameters: the weights that values are about, as in the direction: last-layers:K, all-linear or all.
        method: forward, central, or auto (`choose_method`).
        central_step: of the direction, as another estimator of it has found it; default: it is looked for.
        tangent_dtype: float8 or None; forward mode's products of linear layers (tangent_linear.py).

    Raises:
        UserError: the method does not fit the model's dtype, the device knows no such tangents, or a weight is of a
            kind that cannot be scored.
    """

    def __init__(
        self,
        scoring: ScoringModel,
        parameters: str,
        direction: Tensors | Targets,
        drift: Tensors | None = None,
        method: str = "auto",
        central_step: float | None = None,
        tangent_dtype: str | None = None,
    ) -> None:
        self.scoring = scoring
        self.layers = decoder_layers(scoring.model)
        self.first_layer = None if parameters == "all" else first_scored_layer(scoring.model, parameters)
        self.method = choose_method(method, scoring.dtype, tangent_dtype)
        directions = by_column(direction) | ({} if drift is None else {"stability": drift})
        self.shared: HiddenTangents | None = None
        if self.method == "forward":
            if tangent_dtype:
                check_float8(scoring.device)
            wide = wide_products(scoring.device, scoring.dtype)
            self.tangents = {}
            for name, tensors in directions.items():
                products, others = products_of(scoring.model, tensors, tangent_dtype, wide)
                self.tangents[name] = products, self._tangent(others)
            if isinstance(direction, Targets) and len(directions) > 1 and not wide and not tangent_dtype:
                self.shared = HiddenTangents(scoring, {name: own for name, (_, own) in self.tangents.items()})
                self.tangents = {name: ({}, own) for name, own in self.shared.parts.items()}
        else:
            if isinstance(direction, Targets):
                known = {target_column(name): step for name, step in direction.central_steps.items()}
            else:
                self.central_step = central_step or self._relative_step(direction)
                known = {ADAPTATION: self.central_step}
            self.steps = {name: self._perturbed(tensors, known.get(name)) for name, tensors in directions.items()}

    def __call__(self, batch: Batch) -> TokenValues:
        run = self._forward_mode if self.method == "forward" else self._central
        values, logprobs = run(batch)
        stability = values.pop("stability", torch.zeros_like(logprobs))
        adaptation, targets = adaptation_of(values)
        return TokenValues(adaptation, stability, logprobs, targets)

    def _tangent(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self.scoring.device, self.scoring.dtype) for name, tensor in tensors.items()}

    # forward mode

    @torch.no_grad()
    def _forward_mode(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        trunk = Trunk(self.layers, self.first_layer)
        values: dict[str, torch.Tensor] = {}
        head = None
        for name, primal, tangent in self._hidden_tangents(batch, trunk):
            own = self._head_tangents(self.tangents[name][1])
            if head is None or own is not None:
                head = self.scoring.head(primal, batch.targets, gradient=True, tangents=own)
            assert head.hidden_gradient is not None
            values[name] = (head.hidden_gradient * tangent).sum(-1, dtype=head.losses.dtype)
            if own is not None and head.weight_tangent is not None:
                values[name] = values[name] + head.weight_tangent
        assert head is not None, "no direction"
        return values, -head.losses

    def _hidden_tangents(self, batch: Batch, trunk: Trunk) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, final hidden states ND, their derivative ND) of each direction."""
        if self.shared is not None and (found := self.shared(batch, trunk)) is not None:
            primal, derivatives = found
            yield from ((name, primal, derivative) for name, derivative in zip(self.tangents, derivatives, strict=True))
            return
        for name, (products, tangents) in self.tangents.items():
            yield name, *hidden_tangent(self.scoring, batch, tangents, trunk, products)

    def _head_tangents(self, tangents: Tensors) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Of the head's own weight and bias; None where they are not scored."""
        projection = self.scoring.head.projection
        weight = tangent_of(self.scoring.model, cast(nn.Parameter, projection.weight), tangents)
        bias = tangent_of(self.scoring.model, projection.bias, tangents)
        if weight is None and bias is not None:
            weight = torch.zeros_like(projection.weight)
        return None if weight is None else (weight, bias)

    # central difference

    def _perturbed(self, tensors: Tensors, share: float | None) -> tuple[Tensors, Tensors, float]:
        """(W + eps M, W - eps M, eps), eps |M| being that share of |W|."""
        unit = self._unit(tensors)
        if unit is None:  # the drift at the reference checkpoint itself: no step, value zero
            return {}, {}, 1.0
        return self._moved(tensors, (share or self._relative_step(tensors)) * unit)

    def _relative_step(self, tensors: Tensors) -> float:
        """The step, as a share of |W|, whose derivative on a fixed probe agrees best with its neighbour's.

        The probe is the same tokens for every batch, so the step depends on the model and the direction alone.
        """
        unit = self._unit(tensors)
        if unit is None:
            return RELATIVE_STEPS[-1]
        found = [self._probe(self._moved(tensors, share * unit)) for share in RELATIVE_STEPS]
        changes = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, found[1:], strict=False)]
        return RELATIVE_STEPS[changes.index(min(changes)) + 1]

    def _unit(self, tensors: Tensors) -> float | None:
        """|W| / |M|; None where M is zero."""
        parameters = dict(self.scoring.model.named_parameters())
        weights_norm = _norm(parameters[name].detach() for name in tensors)
        direction_norm = _norm(tensors.values())
        return weights_norm / direction_norm if direction_norm else None

    @torch.no_grad()
    def _probe(self, step: tuple[Tensors, Tensors, float]) -> torch.Tensor:
        """The derivative of the losses of fixed pseudo-random tokens."""
        vocabulary = self.scoring.head.projection.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (4, PROBE_TOKENS // 4), generator=generator).to(self.scoring.device)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4))
        trunk = Trunk(self.layers, self.first_layer)
        plus, minus, eps = step
        with self._routing(batch, trunk)[0]:
            return (self._losses(batch, plus, trunk) - self._losses(batch, minus, trunk)) / (2 * eps)

    def _moved(self, tensors: Tensors, eps: float) -> tuple[Tensors, Tensors, float]:
        parameters = dict(self.scoring.model.named_parameters())
        plus, minus = {}, {}
        for name, tensor in tensors.items():
            weight = parameters[name].detach()
            step = eps * tensor.to(weight.device, weight.dtype)
            plus[name], minus[name] = weight + step, weight - step
        return plus, minus, eps

    @torch.no_grad()
    def _central(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        values, logprobs, trunk = {}, None, Trunk(self.layers, self.first_layer)
        routing, losses = self._routing(batch, trunk)
        if losses is not None:
            logprobs = -losses
        for name, (plus, minus, eps) in self.steps.items():
            with routing:
                above = self._losses(batch, plus, trunk)
                below = above if not minus else self._losses(batch, minus, trunk)
            values[name] = (above - below) / (2 * eps)
            if logprobs is None:  # the mean of both sides: off by eps^2 l'' / 2 (see the test of its size)
                logprobs = -(above + below) / 2
        assert logprobs is not None, "no direction"
        return values, logprobs

    def _routing(self, batch: Batch, trunk: Trunk) -> tuple[AbstractContextManager, torch.Tensor | None]:
        """(what holds every token with its experts; then also the losses of the pass that has found them)."""
        if not is_routed(self.scoring.model):
            return nullcontext(), None
        routing = FixedRouting(self.layers[self.first_layer or 0])
        with routing:
            losses = self._losses(batch, {}, trunk)
        return routing, losses

    def _losses(self, batch: Batch, weights: Tensors, trunk: Trunk) -> torch.Tensor:
        with still_padding(self.scoring.model, weights), swapped_weights(self.scoring.model, weights), trunk:
            return self.scoring.head(self.scoring.predicting_states(batch), batch.targets).losses


@contextmanager
def swapped_weights(model: nn.Module, weights: Tensors) -> Iterator[None]:
    """The named parameters have other values inside."""
    parameters = dict(model.named_parameters())
    originals = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original


def tangent_of(model: nn.Module, parameter: nn.Parameter | None, tangents: Tensors) -> torch.Tensor | None:
    """The tangent of a parameter, found by identity; None where it is not scored."""
    return next((tangents.get(name) for name, p in model.named_parameters() if p is parameter), None)


def _norm(tensors) -> float:
    return float(torch.sqrt(sum(tensor.double().square().sum() for tensor in tensors)))
