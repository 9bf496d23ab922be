"""The exact estimator: <grad l_t, M> of every response token at once, without a backward pass on training rows.

    forward   forward-mode AD: weights carry the tangent M, one forward pass gives every l_t and its derivative
    central   (l_t(W + eps M) - l_t(W - eps M)) / (2 eps): two plain forward passes, any kernel; float32 and wider

Only layers from the first scored one on pay: the trunk below has no tangent (forward) or is shared (central).
Adaptation is along the direction, stability along the drift. M may be any direction in any set of weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.autograd import forward_ad

from alphatoken.architecture import decoder, decoder_layers, first_scored_layer
from alphatoken.attention import differentiable
from alphatoken.batching import Batch
from alphatoken.direction import Tensors
from alphatoken.errors import UserError
from alphatoken.experts import FixedRouting, differentiable_experts, is_routed
from alphatoken.model import ScoringModel
from alphatoken.tangent_linear import Stacked, stacked_tangents, stacked_weights, wide_products
from alphatoken.trunk import Trunk
from alphatoken.values import TokenValues

# Central steps that are tried, as shares of the weights' norm. Truncation grows with the step's square, rounding with
# its inverse, and where they meet differs by a factor of a thousand: a real model bends far more along its own gradient
# than a random one along a random direction.
RELATIVE_STEPS = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
PROBE_TOKENS = 128


def choose_method(method: str, dtype: torch.dtype) -> str:
    """auto: central difference in float32, where it is precise enough and cheaper; else forward mode.

    Forward mode costs about three passes of the scored layers, central difference two and a second pass of the head
    (benchmarks/speed.py). bfloat16 rounds a small step away.

    Raises:
        UserError: central difference in bfloat16.
    """
    if method == "central" and dtype not in (torch.float32, torch.float64):
        raise UserError("--method central needs --dtype float32: bfloat16 rounds the step away; use --method forward")
    if method != "auto":
        return method
    return "central" if dtype == torch.float32 else "forward"


class Exact:
    """Exact values along `direction` and, where given, `drift` (both by parameter name).

    central_step: of the direction, as another estimator of it has found it; default: it is looked for.
    """

    def __init__(
        self,
        scoring: ScoringModel,
        parameters: str,
        direction: Tensors,
        drift: Tensors | None = None,
        method: str = "auto",
        central_step: float | None = None,
    ) -> None:
        self.scoring = scoring
        self.layers = decoder_layers(scoring.model)
        self.first_layer = None if parameters == "all" else first_scored_layer(scoring.model, parameters)
        self.method = choose_method(method, scoring.dtype)
        directions = {"adaptation": direction} | ({} if drift is None else {"stability": drift})
        if self.method == "forward":
            wide = wide_products(scoring.device, scoring.dtype)
            self.tangents = {}
            for name, tensors in directions.items():
                stacked, others = stacked_weights(scoring.model, tensors) if wide else ({}, tensors)
                self.tangents[name] = stacked, self._tangent(others)
        else:
            self.central_step = central_step or self._relative_step(direction)
            known = {"adaptation": self.central_step}
            self.steps = {name: self._perturbed(tensors, known.get(name)) for name, tensors in directions.items()}

    def __call__(self, batch: Batch) -> TokenValues:
        run = self._forward_mode if self.method == "forward" else self._central
        values, logprobs = run(batch)
        stability = values.get("stability", torch.zeros_like(logprobs))
        return TokenValues(values["adaptation"], stability, logprobs)

    def _tangent(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self.scoring.device, self.scoring.dtype) for name, tensor in tensors.items()}

    # forward mode

    @torch.no_grad()
    def _forward_mode(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        values, logprobs, trunk = {}, None, Trunk(self.layers, self.first_layer)
        for name, (stacked, tangents) in self.tangents.items():
            primal, tangent = hidden_tangent(self.scoring, batch, tangents, trunk, stacked)
            values[name], losses = self._loss_tangent(primal, tangent, batch.targets, tangents)
            logprobs = -losses
        return values, logprobs

    def _loss_tangent(
        self, primal: torch.Tensor, tangent: torch.Tensor, targets: torch.Tensor, tangents: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dl/dh . h', and the head's own part where the head's weight is scored: (N, losses N)."""
        projection = self.scoring.head.projection
        weight = tangent_of(self.scoring.model, projection.weight, tangents)
        bias = tangent_of(self.scoring.model, projection.bias, tangents)
        if weight is None and bias is not None:
            weight = torch.zeros_like(projection.weight)
        head_tangents = None if weight is None else (weight, bias)
        head = self.scoring.head(primal, targets, gradient=True, tangents=head_tangents)
        value = (head.hidden_gradient * tangent).sum(-1, dtype=head.losses.dtype)
        if head.weight_tangent is not None:
            value = value + head.weight_tangent
        return value, head.losses

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
        with swapped_weights(self.scoring.model, weights), trunk:
            hidden = decoder(self.scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            return self.scoring.head(hidden[batch.predicting], batch.targets).losses


@torch.no_grad()
def hidden_tangent(
    scoring: ScoringModel, batch: Batch, tangents: Tensors, trunk: Trunk, stacked: Stacked | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(final hidden states at the predicting positions, their derivative along `tangents`), each ND.

    stacked: layers whose tangents are in there instead.
    """
    duals, experts = dual_weights(scoring.model, tangents), differentiable_experts(scoring.model)
    with forward_ad.dual_level(), duals, stacked_tangents(stacked or {}), differentiable(), experts, trunk:
        try:
            hidden = decoder(scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        except NotImplementedError as error:
            raise UserError(
                f"{_raising_module(scoring.model, error)} has no forward-mode derivative: use --method central"
            ) from error
        predicting = forward_ad.unpack_dual(hidden[batch.predicting])
        primal, tangent = predicting.primal.clone(), predicting.tangent
        return primal, torch.zeros_like(primal) if tangent is None else tangent.clone()


def _raising_module(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module of the model in the error's traceback."""
    names = {module: name for name, module in model.named_modules()}
    found, traceback = model, error.__traceback__
    while traceback is not None:
        inside = traceback.tb_frame.f_locals.get("self")
        found = inside if isinstance(inside, nn.Module) and inside in names else found
        traceback = traceback.tb_next
    return f"{names[found]} ({type(found).__name__})" if found is not model else type(model).__name__


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


@contextmanager
def dual_weights(model: nn.Module, tangents: Tensors) -> Iterator[None]:
    """The named parameters carry their tangent inside, in every module that uses them (tied weights too)."""
    named = dict(model.named_parameters())
    duals = {id(named[name]): forward_ad.make_dual(named[name].detach(), tangent) for name, tangent in tangents.items()}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in duals
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = duals[id(parameter)]
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


def tangent_of(model: nn.Module, parameter: nn.Parameter | None, tangents: Tensors) -> torch.Tensor | None:
    """The tangent of a parameter, found by identity; None where it is not scored."""
    return next((tangents.get(name) for name, p in model.named_parameters() if p is parameter), None)


def _norm(tensors) -> float:
    return float(torch.sqrt(sum(tensor.double().square().sum() for tensor in tensors)))
