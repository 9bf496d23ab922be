"""How well each estimator ranks tokens by what training on them really does.

    python benchmarks/fidelity.py [--tokens 128] [--json FILE]

Truth: the measured change of the validation loss after one small SGD step on a single token's loss, all parameters
moving. Printed: Spearman's rank correlation of each estimator with it, with 95% bootstrap intervals.
"""

import argparse
import copy

import numpy as np
import torch
from common import DATA_HELP, embedded_file, encoded_rows, print_table, write_result
from rich.progress import track
from scipy.stats import spearmanr

from alphatoken.architecture import decoder
from alphatoken.baselines import Baseline, forward_losses
from alphatoken.batching import Batch, make_batch, plan_batches
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel, load_model, prepare_model
from alphatoken.value_propagation import ValuePropagation

BOOTSTRAP = 2000
BETA2, EPS = 0.999, 1e-8  # of AdamW


def batches_of(rows) -> list[Batch]:
    groups = plan_batches([len(row.input_ids) for row in rows], 2048)
    return [make_batch([rows[i].input_ids for i in g], [rows[i].response_mask for i in g], g) for g in groups]


def validation_loss(scoring: ScoringModel, batches: list[Batch]) -> float:
    """Mean loss of the validation tokens, summed in float64 so that small changes survive."""
    losses = torch.cat([forward_losses(scoring, batch).losses for batch in batches])
    return float(losses.double().mean())


def gradient_of(scoring: ScoringModel, batch: Batch, kept: torch.Tensor) -> list[torch.Tensor]:
    """Of the mean loss of the kept response tokens, by all parameters. kept: (N,) bool in the order of the batch."""
    parameters = list(scoring.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        hidden = decoder(scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = scoring.model.lm_head(hidden[batch.predicting][kept]).float()
        loss = torch.nn.functional.cross_entropy(logits, batch.targets[kept])
        gradients = torch.autograd.grad(loss, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return list(gradients)


@torch.no_grad()
def measured_change(
    scoring: ScoringModel, batch: Batch, kept: torch.Tensor, validation: list[Batch], before: float, rate: float,
    moments: list[torch.Tensor] | None = None, steps: int = 1,
) -> float:  # fmt: skip
    """-(change of validation loss) after steps on the mean loss of the kept response tokens, all parameters moving: of
    SGD, or with second moments of AdamW. The weights are restored exactly.
    """
    parameters = list(scoring.model.parameters())
    saved = [parameter.clone() for parameter in parameters]
    for _ in range(steps):
        gradients = gradient_of(scoring, batch, kept)
        if moments is not None:
            for gradient, v in zip(gradients, moments, strict=True):
                gradient /= (BETA2 * v + (1 - BETA2) * gradient.square()).sqrt_().add_(EPS)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * gradient
    change = validation_loss(scoring, validation) - before
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
    return -change


def adapted_reference(scoring: ScoringModel, batches: list[Batch], steps: int, rate: float) -> ScoringModel:
    """The reference of excess_loss: the same model after a few Adam steps on the validation rows."""
    model = copy.deepcopy(scoring.model).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        batch = batches[step % len(batches)]
        hidden = decoder(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[batch.predicting]).float(), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prepare_model(model)


def estimators(scoring: ScoringModel, batches: list[Batch]):
    """(name, estimator), made one at a time: each holds tensors of the model's size."""
    for parameters in ("all", "all-linear", "last-layers:3"):
        direction = mean_gradient(scoring, batches, GradientOptions(parameters)).tensors
        for method in ("forward", "central") if parameters == "all" else ("auto",):
            yield (
                f"exact, {parameters}" + ("" if method == "auto" else f", {method}"),
                Exact(scoring, parameters, direction, method=method),
            )
    direction = mean_gradient(scoring, batches, GradientOptions("last-layers:3", positions="response")).tensors
    yield "value_propagation, last-layers:3", ValuePropagation(scoring, "last-layers:3", direction)
    yield "direct path only, last-layers:3", ValuePropagation(scoring, "last-layers:3", direction, window=0)
    for signal in ("loss", "entropy", "random"):
        yield signal, Baseline(scoring, signal)
    yield (
        "excess_loss (reference: 4 Adam steps)",
        Baseline(scoring, "excess_loss", adapted_reference(scoring, batches, 4, 1e-5)),
    )


def interval(truth: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95% bootstrap interval of Spearman's correlation over tokens."""
    samples = []
    for _ in range(BOOTSTRAP):
        index = rng.integers(0, len(truth), len(truth))
        samples.append(spearmanr(truth[index], values[index]).statistic)
    return float(np.nanquantile(samples, 0.025)), float(np.nanquantile(samples, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument("--validation", help=DATA_HELP)
    parser.add_argument("--tokens", type=int, default=128, help="random response tokens to measure")
    parser.add_argument("--rows", type=int, default=32, help="rows that they come from")
    parser.add_argument("--validation-rows", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of the single-token SGD step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    scoring = load_model(arguments.model, "float32")
    rows = encoded_rows(arguments.model, [arguments.data or embedded_file("train.jsonl")])[: arguments.rows]
    held_out = encoded_rows(arguments.model, [arguments.validation or embedded_file("validation.jsonl")])
    validation = batches_of(held_out[: arguments.validation_rows])
    before = validation_loss(scoring, validation)
    places = [(i, t) for i, row in enumerate(rows) for t in range(sum(row.response_mask))]
    chosen = [places[k] for k in rng.choice(len(places), size=arguments.tokens, replace=False)]
    truth = np.array([
        measured_change(
            scoring, make_batch([rows[i].input_ids], [rows[i].response_mask]),
            torch.arange(sum(rows[i].response_mask)) == t, validation, before, arguments.rate,
        )
        for i, t in track(chosen, description="measuring single-token steps")
    ])  # fmt: skip
    results = []
    for name, estimator in estimators(scoring, validation):
        per_row: dict[int, np.ndarray] = {}
        needed = sorted({i for i, _ in chosen})
        for i in needed:
            batch = make_batch([rows[i].input_ids], [rows[i].response_mask], [i])
            per_row[i] = estimator(batch).adaptation.double().numpy()
        values = np.array([per_row[i][t] for i, t in chosen])
        low, high = interval(truth, values, rng)
        results.append(
            {"estimator": name, "spearman": float(spearmanr(truth, values).statistic), "low": low, "high": high}
        )
        del estimator
    print_table(
        f"rank correlation with the measured change of validation loss, {arguments.tokens} tokens",
        ["estimator", "Spearman", "95% interval"],
        [[r["estimator"], f"{r['spearman']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"] for r in results],
    )
    write_result(arguments.json, vars(arguments) | {"validation_loss": before, "results": results})


if __name__ == "__main__":
    main()
