"""Final hidden states and their derivative along directions in the weights, by forward-mode AD.

One direction: weights carry its tangent, one forward pass. Several: a batch of tangents on the same pass (vmap), so
that the layers' own forward pass is computed once and each direction adds its tangent pass.

K directions, N response tokens, D hidden width.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from alphatoken.architecture import decoder
from alphatoken.attention import differentiable
from alphatoken.batching import Batch
from alphatoken.direction import Tensors
from alphatoken.errors import UserError
from alphatoken.experts import differentiable_experts
from alphatoken.model import ScoringModel
from alphatoken.tangent_linear import Products, tangents_by
from alphatoken.trunk import Trunk

logger = logging.getLogger(__name__)

NO_BATCHES = ("vmap", "batching rule")  # what torch says where an operation cannot take a batch of tangents


@torch.no_grad()
def hidden_tangent(
    scoring: ScoringModel, batch: Batch, tangents: Tensors, trunk: Trunk, products: Products | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(final hidden states at the predicting positions, their derivative along `tangents`), each ND.

    products: of layers whose tangents are in there instead.
    """
    with forward_ad.dual_level(), tangents_by(products or {}):
        named = dict(scoring.model.named_parameters())
        duals = {name: forward_ad.make_dual(named[name].detach(), tangent) for name, tangent in tangents.items()}
        predicting = forward_ad.unpack_dual(_predicting(scoring, batch, duals, trunk))
        primal, tangent = predicting.primal.clone(), predicting.tangent
        return primal, torch.zeros_like(primal) if tangent is None else tangent.clone()


class HiddenTangents:
    """The same along several directions at once.

    parts: the tangents of each direction, views of stacks that hold all of them.
    """

    def __init__(self, scoring: ScoringModel, tangents: Mapping[str, Tensors]) -> None:
        self.scoring = scoring
        parameters = dict(scoring.model.named_parameters())
        used = [name for name in parameters if any(name in own for own in tangents.values())]
        self.weights = {name: parameters[name].detach() for name in used}
        self.stacks = {
            name: torch.stack([own.get(name, torch.zeros_like(weight)) for own in tangents.values()])
            for name, weight in self.weights.items()
        }
        self.parts = {
            direction: {name: stack[k] for name, stack in self.stacks.items()} for k, direction in enumerate(tangents)
        }
        self.possible = True

    @torch.no_grad()
    def __call__(self, batch: Batch, trunk: Trunk) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(hidden states ND, derivatives KND); None where the model has an operation that takes no batch of tangents.

        Then each direction takes a pass of its own.
        """
        if not self.possible:
            return None
        self._fill(trunk, batch)

        def along(tangents: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
            return jvp(  # type: ignore[return-value]
                lambda weights: _predicting(self.scoring, batch, weights, trunk), (self.weights,), (tangents,)
            )

        try:
            return vmap(along, out_dims=(None, 0))(self.stacks)  # type: ignore[arg-type]
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_BATCHES):
                raise
            logger.info("directions take a forward pass each: %s", str(error).splitlines()[0])
            self.possible = False
            return None

    def _fill(self, trunk: Trunk, batch: Batch) -> None:
        """Run the layers below the first scored one beforehand: what a transform keeps is of no use outside it."""
        if not trunk.first_layer or trunk.hidden is not None:
            return

        def stop(*_) -> None:
            raise _Entered

        with trunk:
            hook = trunk.layers[trunk.first_layer].register_forward_pre_hook(stop)  # after the trunk's own
            try:
                decoder(self.scoring.model)(input_ids=batch.input_ids, use_cache=False)
            except _Entered:
                pass
            finally:
                hook.remove()


class NoForwardMode(UserError):
    """A module of the model has no forward-mode derivative."""


class _Entered(Exception):
    """The first scored layer is reached."""


def _predicting(scoring: ScoringModel, batch: Batch, weights: Tensors, trunk: Trunk) -> torch.Tensor:
    """Final hidden states at the predicting positions with dual numbers as weights: ND."""
    with (
        still_padding(scoring.model, weights),
        replaced_weights(scoring.model, weights),
        differentiable(),
        differentiable_experts(scoring.model),
        trunk,
    ):
        try:
            return scoring.predicting_states(batch)
        except NotImplementedError as error:
            raise NoForwardMode(
                f"{_raising_module(scoring.model, error)} has no forward-mode derivative: use --method central"
            ) from error


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
def still_padding(model: nn.Module, weights: Tensors) -> Iterator[None]:
    """Inside, the padding token of an embedding among `weights` is put in as it was on entry, however its row moves.

    Autograd gives that row no gradient for its use as input, so training does not move it for that; forward mode and
    a moved weight know nothing of it. It matters where the padding token ends turns too, and the head has the same
    weight, which does move.
    """
    moved = {id(parameter) for name, parameter in model.named_parameters() if name in weights}
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in moved:
            with torch.no_grad():
                row = module(torch.tensor(module.padding_idx, device=module.weight.device))
            hooks.append(module.register_forward_hook(partial(_put_back, row)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _put_back(row: torch.Tensor, module: nn.Embedding, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return torch.where((inputs[0] == module.padding_idx)[..., None], row, output)


@contextmanager
def replaced_weights(model: nn.Module, weights: Tensors) -> Iterator[None]:
    """The named parameters are these tensors inside, in every module that uses them (tied weights too)."""
    named = dict(model.named_parameters())
    others = {id(named[name]): tensor for name, tensor in weights.items()}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in others
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = others[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
