"""Scoring time as a multiple of a forward pass that computes logits at response positions only.

    python benchmarks/speed.py [--length 256 --batch-size 8 --dtypes float32 bfloat16] [--json FILE]

All methods run in one process, in turn, on the same batch of real text (half of each row is response); ratios are of
medians. Peak memory is that of a fresh process per method, above the loaded model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import (
    DATA_HELP,
    embedded_file,
    encoded_rows,
    in_own_process,
    packed_batch,
    peak_mb_of,
    print_table,
    write_result,
)
from paper_procedure import paper_values

from alphatoken.architecture import decoder
from alphatoken.batching import Batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.float8 import CAPABILITY
from alphatoken.model import ScoringModel, load_model
from alphatoken.value_propagation import ValuePropagation

K3, ALL = "last-layers:3", "all-linear"
WINDOW = 32
FLOAT8 = "exact, all-linear, forward mode, float8 tangents"
PAPER = "the paper's procedure, K = 3"


def directions(scoring: ScoringModel, validation: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """Made once per checkpoint, so not part of any timing."""
    parts = [Batch(*(x[i : i + 4] for x in (validation.input_ids, validation.response_mask, validation.row_ids)))
             for i in range(0, len(validation.input_ids), 4)]  # fmt: skip
    found = {}
    for name, parameters, positions in (("paper", K3, "response"), ("all", ALL, "all")):
        found[name] = mean_gradient(scoring, parts, GradientOptions(parameters, positions=positions)).tensors
    return found


def forward_pass(scoring: ScoringModel, batch: Batch) -> Callable[[], torch.Tensor]:
    """The unit: logits at response positions only."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            hidden = decoder(scoring.model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            return scoring.head.projection(hidden[batch.predicting])

    return forward


def methods(scoring: ScoringModel, batch: Batch, validation: Batch, found: dict) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name. The first is the unit."""
    last = {name: tensor for name, tensor in found["all"].items() if name in found["paper"]}
    makers: dict[str, Callable[[], Callable]] = {
        "value_propagation, K = 3": lambda: ValuePropagation(scoring, K3, found["paper"], window=WINDOW),
        "exact, K = 3, forward mode": lambda: Exact(scoring, K3, last, method="forward"),
        "exact, all-linear, forward mode": lambda: Exact(scoring, ALL, found["all"], method="forward"),
    }
    if scoring.dtype == torch.float32:
        makers |= {
            "exact, K = 3, central difference": lambda: Exact(scoring, K3, last, method="central"),
            "exact, all-linear, central difference": lambda: Exact(scoring, ALL, found["all"], method="central"),
        }
    if scoring.device.type == "cuda" and torch.cuda.get_device_capability(scoring.device) >= CAPABILITY:
        makers[FLOAT8] = lambda: Exact(scoring, ALL, found["all"], tangent_dtype="float8")
    timed: dict[str, Callable[[], object]] = {"forward pass": forward_pass(scoring, batch)}
    for name, make in makers.items():
        estimator = make()
        timed[name] = lambda estimator=estimator: estimator(batch)
    return timed


def time_all(timed: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that drift of the machine's speed hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, call in timed.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_paper(scoring: ScoringModel, batch: Batch, validation: Batch) -> tuple[torch.Tensor, float]:
    """(values, seconds) of the paper's procedure, once: it takes minutes."""
    scoring.model.set_attn_implementation("eager")
    scoring.model.requires_grad_(True)
    try:
        started = time.perf_counter()
        values = paper_values(scoring.model, batch, validation, K3, WINDOW)
        return values, time.perf_counter() - started
    finally:
        scoring.model.zero_grad(set_to_none=True)
        scoring.model.requires_grad_(False)
        scoring.model.set_attn_implementation("alphatoken")


def load_all(arguments: argparse.Namespace, dtype: str):
    rows = encoded_rows(arguments.model, [arguments.data or embedded_file("train.jsonl")])
    scoring = load_model(arguments.model, dtype)
    batch = packed_batch(rows, arguments.batch_size, arguments.length).to(scoring.device)
    validation = packed_batch(rows[::-1], arguments.validation_examples, arguments.length).to(scoring.device)
    return scoring, batch, validation


def peak_memory(arguments: argparse.Namespace, dtype: str, name: str) -> float:
    """MB above the loaded model and its directions, in a process of its own."""
    return in_own_process(_peak_memory, arguments, dtype, name)


def _peak_memory(arguments: argparse.Namespace, dtype: str, name: str) -> float:
    scoring, batch, validation = load_all(arguments, dtype)
    if name == PAPER:
        call = lambda: run_paper(scoring, batch, validation)  # noqa: E731
    else:
        shapes = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in scoring.model.named_parameters()}
        found = {"all": {n: t + 1e-6 for n, t in shapes.items() if "layers" in n and "proj" in n}}
        last = sorted({int(n.split(".")[2]) for n in found["all"]})[-3:]
        found["paper"] = {n: t for n, t in found["all"].items() if int(n.split(".")[2]) in last}
        call = methods(scoring, batch, validation, found)[name]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_mb_of(call)


def benchmark(arguments: argparse.Namespace, dtype: str) -> dict:
    scoring, batch, validation = load_all(arguments, dtype)
    found = directions(scoring, validation)
    timed = methods(scoring, batch, validation, found)
    seconds = time_all(timed, arguments.repeats)
    result: dict = {"dtype": dtype, "tokens": batch.input_ids.numel(), "methods": {}}
    agreement = None
    if not arguments.skip_paper and dtype == "float32":
        ours = timed["value_propagation, K = 3"]().adaptation.cpu()
        theirs, seconds[PAPER] = run_paper(scoring, batch, validation)
        agreement = float((ours - theirs).abs().max() / theirs.abs().max())
        result["paper_agreement"] = agreement
    unit = seconds["forward pass"]
    for name, value in seconds.items():
        memory = None if arguments.skip_memory else peak_memory(arguments, dtype, name)
        result["methods"][name] = {"seconds": value, "ratio": value / unit, "peak_mb": memory}
    if agreement is not None:
        result["paper_over_ours"] = seconds[PAPER] / seconds["value_propagation, K = 3"]
    return result


def show(result: dict) -> None:
    rows = [
        [name, f"{m['seconds']:.2f}", f"{m['ratio']:.2f}", f"{result['tokens'] / m['seconds']:,.0f}",
         "-" if m["peak_mb"] is None else f"{m['peak_mb']:,.0f}"]
        for name, m in result["methods"].items()
    ]  # fmt: skip
    print_table(result["dtype"], ["method", "seconds", "x forward", "tokens/s", "peak MB above the model"], rows)
    if "paper_agreement" in result:
        print_table(
            "value_propagation against the paper's procedure",
            ["times faster", "largest relative difference of values"],
            [[f"{result['paper_over_ours']:.1f}", f"{result['paper_agreement']:.1e}"]],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--validation-examples", type=int, default=32, help="that the paper's procedure runs with")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-paper", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = []
    for dtype in arguments.dtypes:
        results.append(benchmark(arguments, dtype))
        show(results[-1])
    shape = {"model": arguments.model, "length": arguments.length, "batch_size": arguments.batch_size}
    write_result(arguments.json, shape | {"results": results})


if __name__ == "__main__":
    main()
