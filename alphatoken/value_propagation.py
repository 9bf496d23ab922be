"""The paper's estimator (`value_propagation`): Eqs. 8, 9, 11, 12 by contraction.

    adaptation(p) = sum over S of (delta_p + [v_proj only] abar_p)^T G h_p,    abar_p = sum_{0<k-p<=W} A[k,p] delta_k
    stability(p)  = the same with D in the place of G

Values belong to positions p = t - 1, which predict token t. One forward pass, one backward pass through the scored
layers (response_backward.py), one matrix product per scored linear and direction: several targets share all but their
products.
"""

import torch

from alphatoken.architecture import check_value_projections, scored_linears, value_rows
from alphatoken.banded_average import banded_average
from alphatoken.batching import Batch
from alphatoken.capture import Captured, capture
from alphatoken.contraction import bilinear
from alphatoken.direction import Tensors
from alphatoken.model import ScoringModel
from alphatoken.values import Targets, TokenValues, adaptation_of, by_column


class ValuePropagation:
    """Values by contraction along `direction`, or several targets, and, where given, `drift` (all by parameter name).

    Called with a batch it returns adaptation (Eqs. 8 and 9), stability (Eqs. 11 and 12) and their direct and causal
    terms, one for each response token. Without a direction there are no values until `set_directions`.

    Args:
        parameters: last-layers:K or all-linear; `direction` and `drift` have to be of the same.
        window: later positions whose losses count for the causal path; 0 leaves it out.

    Raises:
        UserError: a weight is of a kind that has no value here, named in the message.
    """

    def __init__(
        self,
        scoring: ScoringModel,
        parameters: str,
        direction: Tensors | Targets | None,
        drift: Tensors | None = None,
        window: int = 32,
    ) -> None:
        self.scoring = scoring
        self.window = window
        self.linears = scored_linears(scoring.model, parameters)
        check_value_projections(self.linears, scoring.model)
        rows = {linear.name: value_rows(linear, scoring.model) for linear in self.linears}
        self.value_rows = {name: index.to(scoring.device) for name, index in rows.items() if index is not None}
        self.directions: dict[str, Tensors] = {}
        if direction is not None:
            self.set_directions(direction, drift)

    @property
    def attention_layers(self) -> frozenset[int]:
        """Layers whose queries and keys the causal path needs."""
        return frozenset(linear.layer for linear in self.linears) if self.window else frozenset()

    def set_directions(self, direction: Tensors | Targets, drift: Tensors | None = None) -> None:
        """What values are measured along from now on."""
        self.directions = {name: self._prepare(tensors) for name, tensors in by_column(direction).items()}
        if drift is not None:
            self.directions["stability"] = self._prepare(drift)

    def _prepare(self, tensors: Tensors) -> Tensors:
        """(D_out, D_in), contiguous, in the dtype of the matrix products."""
        return {
            linear.name: linear.from_native(tensors[linear.name])
            .to(self.scoring.device, self.scoring.dtype)
            .contiguous()
            for linear in self.linears
        }

    def __call__(self, batch: Batch) -> TokenValues:
        captured = capture(
            self.scoring, batch, self.linears, attention_layers=self.attention_layers, responses_only=True
        )
        return self.values(captured, batch)

    @torch.no_grad()
    def values(self, captured: Captured, batch: Batch) -> TokenValues:
        """Values from what a forward and a backward pass of `batch` left behind."""
        terms = self._terms(captured, batch)
        zero = torch.zeros_like(captured.losses)
        adaptations = [name for name in self.directions if name != "stability"]
        direct, _ = adaptation_of({name: terms[f"{name}_direct"] for name in adaptations})
        causal, _ = adaptation_of({name: terms[f"{name}_causal"] for name in adaptations})
        targets = {name: terms[f"{name}_direct"] + terms[f"{name}_causal"] for name in adaptations}
        terms |= {"adaptation_direct": direct, "adaptation_causal": causal}
        return TokenValues(
            adaptation=direct + causal,
            stability=terms.get("stability_direct", zero) + terms.get("stability_causal", zero),
            logprobs=-captured.losses,
            terms={f"{name}_{path}": terms.get(f"{name}_{path}", zero) for name, path in _TERMS}
            | adaptation_of(targets)[1],
        )

    def _terms(self, captured: Captured, batch: Batch) -> dict[str, torch.Tensor]:
        """Direct and causal term of every direction, each N."""
        terms = {
            f"{name}_{path}": torch.zeros_like(captured.losses)
            for name in self.directions
            for path in ("direct", "causal")
        }
        where = batch.predicting
        for linear in self.linears:
            delta_all = captured.deltas[linear.name]
            h, delta = captured.inputs[linear.name][where], delta_all[where]
            rows = self.value_rows.get(linear.name)
            ahead = None
            if rows is not None and self.window:
                ahead = banded_average(captured.attention[linear.layer], delta_all[..., rows], self.window)[where]
            for name, tensors in self.directions.items():
                matrix = tensors[linear.name]
                terms[f"{name}_direct"] += bilinear(delta, matrix, h)
                if ahead is not None:
                    terms[f"{name}_causal"] += bilinear(ahead, matrix[rows], h)
        return terms


_TERMS = [(name, path) for name in ("adaptation", "stability") for path in ("direct", "causal")]
