"""How well each estimator foretells real steps: single tokens and groups, SGD and AdamW, one step and several.

    python benchmarks/fidelity_steps.py [--singles 96] [--groups 64] [--json FILE]

Truth: the measured change of the validation loss after steps on the mean loss of a token, or of a group of GROUP tokens
drawn from ROWS_OF_GROUP rows; all parameters move. An AdamW step is rate * g / (sqrt(v') + eps) with v' = 0.999 v +
0.001 g^2 and v from training rows that are not measured; momentum and weight decay are the same for all tokens and left
out. After a step of several, the gradient is taken again. A group's value is the mean of its tokens' values at the
first weights.
Printed: Spearman's rank correlation over tokens or groups, with 95% bootstrap intervals.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from common import DATA_HELP, embedded_file, encoded_rows, print_table, write_result
from fidelity import adapted_reference, batches_of, interval, measured_change, validation_loss
from rich.progress import track
from scipy.stats import spearmanr

from alphatoken.baselines import Baseline
from alphatoken.batching import Batch, make_batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.direction import GradientOptions, adam_scale, mean_gradient, second_moments
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel, load_model
from alphatoken.value_propagation import ValuePropagation

GROUP, ROWS_OF_GROUP = 16, 4
MOMENT_ROWS = 32  # the first ones of the data; batches of 8
LAYERS = (1, 3, 6, 12)
Tokens = list[tuple[int, int]]  # (row, response token)


@dataclass(frozen=True)
class Setting:
    """What is measured. rate: of SGD, or of an AdamW step; small enough for the change to be about linear."""

    name: str
    grouped: bool
    adamw: bool
    steps: int
    rate: float


SETTINGS = (
    Setting("one token, SGD", False, False, 1, 1e-4),
    Setting("one token, AdamW", False, True, 1, 1e-6),
    Setting("16 tokens, SGD", True, False, 1, 1e-3),
    Setting("16 tokens, AdamW", True, True, 1, 1e-5),
    Setting("16 tokens, AdamW, 4 steps", True, True, 4, 1e-5),
)


def measured(
    scoring: ScoringModel, rows: list, tokens: Tokens, validation: list[Batch], before: float, setting: Setting,
    moments: list[torch.Tensor],
) -> float:  # fmt: skip
    """-(change of validation loss) after the setting's steps on these tokens."""
    wanted = sorted({row for row, _ in tokens})
    batch = make_batch([rows[i].input_ids for i in wanted], [rows[i].response_mask for i in wanted])
    kept = torch.tensor([(row, t) in tokens for row in wanted for t in range(sum(rows[row].response_mask))])
    given = moments if setting.adamw else None
    return measured_change(scoring, batch, kept, validation, before, setting.rate, given, setting.steps)


def estimators(scoring: ScoringModel, validation: list[Batch], scale: dict) -> Iterator[tuple[str, Callable]]:
    """(name, estimator), made one at a time: each holds tensors of the model's size."""
    everything = mean_gradient(scoring, validation, GradientOptions("all")).tensors
    yield "exact, all", Exact(scoring, "all", everything)
    preconditioned = {name: tensor * scale[name] for name, tensor in everything.items()}
    yield "exact, all, preconditioned", Exact(scoring, "all", preconditioned)
    linear = mean_gradient(scoring, validation, GradientOptions("all-linear")).tensors
    yield "exact, all-linear", Exact(scoring, "all-linear", linear)
    preconditioned = {name: tensor * scale[name] for name, tensor in linear.items()}
    yield "exact, all-linear, preconditioned", Exact(scoring, "all-linear", preconditioned)
    for count in reversed(LAYERS):
        parameters = f"last-layers:{count}"
        last = mean_gradient(scoring, validation, GradientOptions(parameters)).tensors
        yield f"exact, K = {count}", Exact(scoring, parameters, last)
    direction = mean_gradient(scoring, validation, GradientOptions("last-layers:3", positions="response")).tensors
    yield "value_propagation, K = 3", ValuePropagation(scoring, "last-layers:3", direction)
    yield "its direct path, K = 3", ValuePropagation(scoring, "last-layers:3", direction, window=0)
    for signal in ("loss", "entropy", "random"):
        yield signal, Baseline(scoring, signal)
    reference = adapted_reference(scoring, validation, 4, 1e-5)
    yield "excess_loss (reference: 4 Adam steps)", Baseline(scoring, "excess_loss", reference)


def draw(rows: list, rng: np.random.Generator, singles: int, groups: int) -> tuple[list[Tokens], list[Tokens]]:
    """Random single tokens, and groups from a few random rows each."""
    places = [(i, t) for i, row in enumerate(rows) for t in range(sum(row.response_mask))]
    alone = [[places[k]] for k in rng.choice(len(places), size=singles, replace=False)]
    together = []
    for _ in range(groups):
        chosen = rng.choice(len(rows), size=ROWS_OF_GROUP, replace=False)
        inside = [(int(i), t) for i in chosen for t in range(sum(rows[i].response_mask))]
        together.append([inside[k] for k in rng.choice(len(inside), size=GROUP, replace=False)])
    return alone, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument("--validation", help=DATA_HELP)
    parser.add_argument("--singles", type=int, default=96)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="that tokens are drawn from")
    parser.add_argument("--validation-rows", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    scoring = load_model(arguments.model, "float32")
    data = encoded_rows(arguments.model, [arguments.data or embedded_file("train.jsonl")])
    rows = data[MOMENT_ROWS : MOMENT_ROWS + arguments.rows]
    held_out = encoded_rows(arguments.model, [arguments.validation or embedded_file("validation.jsonl")])
    validation = batches_of(held_out[: arguments.validation_rows])
    before = validation_loss(scoring, validation)
    parts = [data[i : i + 8] for i in range(0, MOMENT_ROWS, 8)]
    batches = (make_batch([r.input_ids for r in part], [r.response_mask for r in part]) for part in parts)
    moments = second_moments(scoring, batches, "all")
    scale = adam_scale(moments)
    in_order = [moments[name] for name, _ in scoring.model.named_parameters()]

    alone, together = draw(rows, rng, arguments.singles, arguments.groups)
    truth = {}
    for setting in SETTINGS:
        sets = together if setting.grouped else alone
        truth[setting.name] = np.array(
            [measured(scoring, rows, tokens, validation, before, setting, in_order)
             for tokens in track(sets, description=setting.name)]
        )  # fmt: skip
    results: dict[str, dict] = {}
    for name, estimator in estimators(scoring, validation, scale):
        values = []
        for i, row in enumerate(rows):
            values.append(estimator(make_batch([row.input_ids], [row.response_mask], [i])).adaptation.double().numpy())
        results[name] = {}
        for setting in SETTINGS:
            sets = together if setting.grouped else alone
            guess = np.array([np.mean([values[i][t] for i, t in tokens]) for tokens in sets])
            low, high = interval(truth[setting.name], guess, rng)
            found = float(spearmanr(truth[setting.name], guess).statistic)
            results[name][setting.name] = {"spearman": found, "low": low, "high": high}
        del estimator
    print_table(
        f"rank correlation with the measured change: {arguments.singles} tokens, {arguments.groups} groups",
        ["estimator", *(setting.name for setting in SETTINGS)],
        [[name, *(f"{x['spearman']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in found.values())]
         for name, found in results.items()],
    )  # fmt: skip
    changes = {name: {"mean": float(x.mean()), "spread": float(x.std())} for name, x in truth.items()}
    counts = {"singles": arguments.singles, "groups": arguments.groups, "rows": arguments.rows}
    write_result(
        arguments.json,
        counts | {"model": arguments.model, "validation_rows": arguments.validation_rows, "seed": arguments.seed,
                  "validation_loss": before, "changes": changes, "results": results},
    )  # fmt: skip


if __name__ == "__main__":
    main()
