"""Whether torch.compile pays: passes with compiled decoder layers beside the same without.

    python benchmarks/compiled.py [--lengths 128 512] [--dtype float32] [--json FILE]

A forward pass and, in float32, the central difference over all linear weights: what runs layers without looking into
them. Forward mode and `value_propagation` do look, by dual numbers and by hooks, and cannot use compiled layers.
"""

import argparse
import time

import torch
from common import DATA_HELP, embedded_file, encoded_rows, packed_batch, print_table, write_result
from speed import ALL, forward_pass, time_all

from alphatoken.architecture import decoder_layers, scored_parameters
from alphatoken.batching import Batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel, load_model

STEP = 1e-4  # of the central difference: any does for its time


def passes(scoring: ScoringModel, batch: Batch) -> dict:
    """What is timed, by name."""
    timed = {"forward pass": forward_pass(scoring, batch)}
    if scoring.dtype == torch.float32:
        torch.manual_seed(0)
        direction = {name: torch.randn_like(weight) for name, weight in scored_parameters(scoring.model, ALL).items()}
        central = Exact(scoring, ALL, direction, method="central", central_step=STEP)
        timed["exact, all-linear, central difference"] = lambda: central(batch)
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = encoded_rows(arguments.model, [arguments.data or embedded_file("train.jsonl")])
    plain, compiled = (load_model(arguments.model, arguments.dtype) for _ in range(2))
    for layer in decoder_layers(compiled.model):
        layer.compile(dynamic=True)
    results = []
    for length in arguments.lengths:
        batch = packed_batch(rows, max(1, arguments.batch_tokens // length), length).to(plain.device)
        ours, theirs = passes(plain, batch), passes(compiled, batch)
        started = time.perf_counter()
        for call in theirs.values():
            call()
        first = time.perf_counter() - started
        seconds = time_all(ours | {f"{name}, compiled": call for name, call in theirs.items()}, arguments.repeats)
        ratios = {name: seconds[f"{name}, compiled"] / seconds[name] for name in ours}
        results.append({"length": length, "seconds": seconds, "compiled_over_plain": ratios, "first_calls_s": first})
    lines = [
        [name, str(result["length"]), f"{ratio:.2f}"]
        for result in results
        for name, ratio in result["compiled_over_plain"].items()
    ]
    print_table("with compiled layers", ["pass", "tokens of a row", "x without"], lines)
    write_result(arguments.json, {"model": arguments.model, "dtype": arguments.dtype, "results": results})


if __name__ == "__main__":
    main()
