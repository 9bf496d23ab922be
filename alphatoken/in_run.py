"""Values of a training batch from its own forward pass: the paper's Algorithm 1.

    losses l_t, gradients dl_t/dh   one head pass, shared by values and training
    value_propagation               + a backward pass through the scored layers, for their outputs only
    exact                           + a forward-mode pass of the scored layers, from the hidden states that enter them
    training                        backward from the losses that are kept

Values never reach a `.grad`, so gradients that a trainer has accumulated stay as they are. The head's softmax is
computed once for all of it, and again only for kept tokens, whose gradient the head's weight needs.

B rows, T positions, N response tokens of the batch in row-major order, D hidden width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from alphatoken import direction as directions
from alphatoken.architecture import decoder, decoder_layers, first_scored_layer
from alphatoken.attention import NAME as ATTENTION
from alphatoken.attention import recording
from alphatoken.batching import Batch
from alphatoken.capture import Captured, by_position, capturing, check_all_ran
from alphatoken.errors import UserError
from alphatoken.head import LossHead, TrainedLosses, check_head
from alphatoken.hidden_tangent import hidden_tangent
from alphatoken.model import ScoringModel
from alphatoken.selection import keep_count
from alphatoken.suspects import TokenLosses, validation_losses
from alphatoken.trunk import Trunk
from alphatoken.value_propagation import ValuePropagation

ESTIMATORS = ("value_propagation", "exact")


@dataclass(frozen=True)
class ValuedForward:
    """One training forward pass."""

    losses: torch.Tensor  # N, with the training graph; float32 or wider
    values: torch.Tensor | None  # N, no graph; None before the first direction


class InRun:
    """A model in training that values its batches on the way. Its weights stay trainable; dropout is switched off."""

    def __init__(self, model: PreTrainedModel, estimator: str, parameters: str, window: int = 32) -> None:
        if estimator not in ESTIMATORS:
            raise UserError(f"--in-run knows the estimators {' and '.join(ESTIMATORS)}, not {estimator}")
        if parameters in ("all", "lora"):
            raise UserError("--in-run scores linear weights: use --parameters last-layers:K or all-linear")
        without_dropout(model)
        model.set_attn_implementation(ATTENTION)
        head = LossHead(model)
        if head.projection.bias is not None:
            raise UserError(f"--in-run does not know output heads with a bias, as {type(model).__name__} has")
        check_head(model, head)
        self.parameters = parameters
        self.scoring: ScoringModel = ScoringModel(model, head)
        self._watch: _Propagation | _Tangent = (
            _Propagation(self.scoring, parameters, window)
            if estimator == "value_propagation"
            else _Tangent(self.scoring, parameters)
        )

    def forward(self, batch: Batch, valued: bool = True) -> ValuedForward:
        """Losses to train on and, unless told otherwise, values at the current weights along the direction.

        The batch is padded on the right, so no attention mask is needed. Works under autocast.
        """
        valued = valued and self._watch.ready
        with torch.enable_grad(), self._watch.watching() if valued else nullcontext():
            hidden = decoder(self.scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            predicting = hidden[batch.predicting]
        weight = self.scoring.head.projection.weight
        losses, gradient = TrainedLosses.apply(predicting, weight, batch.targets, self.scoring.head)
        values = self._watch.values(batch, predicting, gradient, losses.detach()) if valued else None
        return ValuedForward(losses, values)

    def value(self, batch: Batch) -> ValuedForward:
        """Losses and values without a training graph, where a forward pass cannot be shared."""
        with _frozen(self.scoring.model):
            return self.forward(batch)

    def mean_gradient(self, batches: Iterable[Batch], options: directions.GradientOptions) -> directions.MeanGradient:
        """The validation direction at the current weights."""
        with _frozen(self.scoring.model):
            return directions.mean_gradient(self.scoring, batches, options)

    def validation_losses(self, batches: Iterable[Batch], class_of: torch.Tensor) -> TokenLosses:
        """What bounds are made of, at the current weights."""
        with _frozen(self.scoring.model):
            return validation_losses(self.scoring, batches, class_of)

    def set_direction(self, direction: directions.Tensors) -> None:
        """What values are measured along: G, or G + lambda D."""
        self._watch.set_direction(direction)


class _Propagation:
    """The paper's estimator on the training graph."""

    def __init__(self, scoring: ScoringModel, parameters: str, window: int) -> None:
        self.estimator = ValuePropagation(scoring, parameters, None, window=window)

    @property
    def ready(self) -> bool:
        return bool(self.estimator.directions)

    def set_direction(self, direction: directions.Tensors) -> None:
        self.estimator.set_directions(direction)

    @contextmanager
    def watching(self) -> Iterator[None]:
        layers = self.estimator.attention_layers
        with capturing(self.estimator.linears) as (inputs, outputs), recording(set(layers)) as attention:
            yield
        check_all_ran(self.estimator.linears, outputs, layers, attention)
        self.seen = inputs, outputs, attention

    def values(
        self, batch: Batch, predicting: torch.Tensor, gradient: torch.Tensor, losses: torch.Tensor
    ) -> torch.Tensor:
        inputs, outputs, attention = self.seen
        del self.seen
        deltas = torch.autograd.grad(predicting, list(outputs.values()), gradient, retain_graph=True)
        inputs, found = by_position(inputs, batch), by_position(dict(zip(outputs, deltas, strict=True)), batch)
        captured = Captured(inputs, found, attention, losses, predicting.detach())
        return self.estimator.values(captured, batch).adaptation


class _Tangent:
    """The exact estimator: the scored layers once more, in forward mode, on what entered them."""

    def __init__(self, scoring: ScoringModel, parameters: str) -> None:
        self.scoring = scoring
        self.layers = decoder_layers(scoring.model)
        self.first_layer = first_scored_layer(scoring.model, parameters)
        self.tangents: directions.Tensors = {}

    @property
    def ready(self) -> bool:
        return bool(self.tangents)

    def set_direction(self, direction: directions.Tensors) -> None:
        self.tangents = {name: tensor.to(self.scoring.device, self.scoring.dtype) for name, tensor in direction.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.entered: torch.Tensor | None = None

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.entered = (args[0] if args else kwargs["hidden_states"]).detach()

        handle = self.layers[self.first_layer].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def values(
        self, batch: Batch, predicting: torch.Tensor, gradient: torch.Tensor, losses: torch.Tensor
    ) -> torch.Tensor:
        trunk = Trunk(self.layers, self.first_layer, self.entered)
        self.entered = None
        _, tangent = hidden_tangent(self.scoring, batch, self.tangents, trunk)
        return (gradient * tangent).sum(-1, dtype=losses.dtype)


def keep_by_quantile(
    values: torch.Tensor,
    rows: torch.Tensor,
    branches: torch.Tensor,
    keep_fraction: float,
    everyones: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> torch.Tensor:
    """N bool: the (1 - keep_fraction) quantile of the step's batch as threshold, one per branch.

    values N; rows N: row of each token; branches N: 0, or 1 for DPO's rejected responses. `everyones` turns the values
    of a branch here into those of all workers. Ties are kept, and so is the best token of a row that would lose all.
    A value that is not finite is dropped.
    """
    values = values.where(values.isfinite(), -torch.inf)
    keep = torch.zeros_like(values, dtype=torch.bool)
    for branch in (0, 1):
        mine = branches == branch
        known = everyones(values[mine])
        if len(known):
            threshold = known.topk(int(keep_count(keep_fraction, len(known)))).values[-1]
            keep[mine] = values[mine] >= threshold
    if len(values):
        count = int(rows.max()) + 1
        kept_rows = torch.zeros(count, dtype=torch.bool, device=rows.device).index_put((rows[keep],), keep[keep])
        best = values.new_full((count,), -torch.inf).scatter_reduce(0, rows, values, "amax")
        keep |= ~kept_rows[rows] & (values == best[rows])
    return keep & values.isfinite()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight needs a gradient inside, so no graph is built below the scored layers."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def without_dropout(model: PreTrainedModel) -> None:
    """A value must be that of the weights, not of a draw: every probability of dropout, every width of jitter is zero.

    Models keep them in modules or as numbers: attention_dropout, layerdrop, router_jitter_noise.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
