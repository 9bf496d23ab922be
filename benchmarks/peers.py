"""Per-row gradient scores of other packages, on the same rows: time in forward passes, peak memory, agreement.

    pip install kronfluence dattri bergson    # with --no-deps, and what they then miss, beside a CPU build of torch
    python benchmarks/peers.py [--rows 8] [--queries 8] [--length 128] [--json FILE]

Every method gives each row the sum over queries of <gradient of the query's loss, gradient of the row's loss>, in all
linear weights of the decoder layers, float32. Losses are sums over response tokens.

    exact, central / forward   ours: one direction from the queries, then a value for every response *token*; the row's
                               score is their sum
    kronfluence                pairwise scores, strategy "identity", query gradients summed: one score per row, or with
                               per-token scores one per position by where the gradient enters the weights
    bergson                    gradients of rows collected by hooks and scored at once against the queries' sum, one per
                               row or, attributing tokens, one per position
    dattri                     TracIn on one checkpoint: gradients of single rows by torch.func, one score per row and
                               query

Each runs in a process of its own, its model loaded before the clock starts; packages that are not there are left out.
"""

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from common import (
    embedded_file,
    encoded_rows,
    in_own_process,
    packed_batch,
    peak_mb_of,
    print_table,
    write_result,
)
from speed import forward_pass
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from alphatoken.architecture import scored_linears
from alphatoken.batching import Batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.direction import GradientOptions, gradient_sum
from alphatoken.embedded import resolve_model
from alphatoken.exact import Exact
from alphatoken.model import load_model

ROWS_PER_STEP = 4  # of every method


def batches(rows: int, queries: int, length: int) -> tuple[Batch, Batch]:
    """(rows, queries), from different ends of the embedded data."""
    encoded = encoded_rows(EMBEDDED_MODEL, [embedded_file("train.jsonl")])
    return packed_batch(encoded, rows, length), packed_batch(encoded[::-1], queries, length)


def parts(batch: Batch) -> list[Batch]:
    split = [tensor.split(ROWS_PER_STEP) for tensor in (batch.input_ids, batch.response_mask, batch.row_ids)]
    return [Batch(*part) for part in zip(*split, strict=True)]


def response_loss(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the response tokens of BT rows."""
    found = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (found * mask[:, 1:].flatten()).sum()


def plain_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(EMBEDDED_MODEL), dtype=torch.float32, attn_implementation="eager"
    ).eval()


class Rows(Dataset):
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": self.batch.input_ids[index], "mask": self.batch.response_mask[index]}


def ours(method: str) -> Callable[[Batch, Batch], Callable[[], torch.Tensor]]:
    def prepare(rows: Batch, queries: Batch) -> Callable[[], torch.Tensor]:
        scoring = load_model(EMBEDDED_MODEL, "float32")

        def run() -> torch.Tensor:
            direction = gradient_sum(scoring, parts(queries), GradientOptions("all-linear")).tensors
            exact = Exact(scoring, "all-linear", direction, method=method)
            return torch.cat([torch.stack([v.sum() for v in b.split(exact(b).adaptation)]) for b in parts(rows)])

        return run

    return prepare


def forward_only(rows: Batch, queries: Batch) -> Callable[[], torch.Tensor]:
    """A forward pass over the rows, logits at response positions."""
    scoring = load_model(EMBEDDED_MODEL, "float32")

    def run() -> torch.Tensor:
        return torch.cat([forward_pass(scoring, part)()[:1, 0] for part in parts(rows)])

    return run


def kronfluence(per_token: bool) -> Callable[[Batch, Batch], Callable[[], torch.Tensor]]:
    def prepare(rows: Batch, queries: Batch) -> Callable[[], torch.Tensor]:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        model = plain_model()
        names = [linear.name.removesuffix(".weight") for linear in scored_linears(model, "all-linear")]

        class Language(Task):
            def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
                return response_loss(model(batch["ids"]).logits, batch["ids"], batch["mask"])

            def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return names

            def get_attention_mask(self, batch: Any) -> None:
                return None

        task = Language()
        model = prepare_model(model, task)
        folder = tempfile.mkdtemp()
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors("none", Rows(rows), factor_args=FactorArguments(strategy="identity"))
        arguments = ScoreArguments(aggregate_query_gradients=True, compute_per_token_scores=per_token)

        def run() -> torch.Tensor:
            analyzer.compute_pairwise_scores(
                "scores", "none", Rows(queries), Rows(rows), per_device_query_batch_size=ROWS_PER_STEP,
                per_device_train_batch_size=ROWS_PER_STEP, score_args=arguments, overwrite_output_dir=True,
            )  # fmt: skip
            found = analyzer.load_pairwise_scores("scores")["all_modules"]
            return found.reshape(len(rows.input_ids), -1).sum(-1)

        return run

    return prepare


def dattri(rows: Batch, queries: Batch) -> Callable[[], torch.Tensor]:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    model = plain_model()
    names = [linear.name for linear in scored_linears(model, "all-linear")]

    def loss(params: dict[str, torch.Tensor], data: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, mask = data["ids"][None], data["mask"][None]
        return response_loss(torch.func.functional_call(model, params, ids).logits, ids, mask)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributor = TracInAttributor(
        AttributionTask(loss, model, state), torch.ones(1), normalized_grad=False, layer_name=names
    )

    def run() -> torch.Tensor:
        loaders = [DataLoader(Rows(batch), batch_size=ROWS_PER_STEP) for batch in (rows, queries)]
        return attributor.attribute(*loaders).sum(-1)

    return run


def bergson(per_token: bool) -> Callable[[Batch, Batch], Callable[[], torch.Tensor]]:
    def prepare(rows: Batch, queries: Batch) -> Callable[[], torch.Tensor]:
        from bergson.collector.collector import CollectorComputer
        from bergson.collector.in_memory_collector import InMemoryCollector
        from bergson.config.config import IndexConfig, PreprocessConfig
        from bergson.gradients import GradientProcessor
        from bergson.score.score_writer import InMemorySequenceScoreWriter, InMemoryTokenScoreWriter
        from bergson.score.scorer import Scorer

        logging.disable(logging.INFO)
        model = plain_model()
        names = {linear.name.removesuffix(".weight").removeprefix("model.")
                 for linear in scored_linears(model, "all-linear")}  # fmt: skip
        folder = tempfile.mkdtemp()
        Path(f"{folder}.part").mkdir()

        def collect(batch: Batch, tokens: bool, scorer: Any = None, aggregation: str = "none") -> Any:
            labels = torch.where(batch.response_mask, batch.input_ids, -100)
            data = datasets.Dataset.from_dict({"input_ids": batch.input_ids.tolist(), "labels": labels.tolist()})
            config = IndexConfig(run_path=folder, attribute_tokens=tokens)
            collector = InMemoryCollector(
                model=model.base_model, cfg=config, processor=GradientProcessor(), target_modules=names, data=data,
                scorer=scorer(data) if scorer else None, preprocess_cfg=PreprocessConfig(aggregation=aggregation),
            )  # fmt: skip
            steps = [part.tolist() for part in torch.arange(len(data)).split(ROWS_PER_STEP)]
            CollectorComputer(
                model=model, data=data, collector=collector, batches=steps, cfg=config
            ).run_with_collector_hooks()
            return collector

        def run() -> torch.Tensor:
            query = collect(queries, False, aggregation="sum").gradients
            writers = []

            def scorer(data: datasets.Dataset) -> Any:
                one_per_row = InMemorySequenceScoreWriter(len(data), 1)
                writers.append(InMemoryTokenScoreWriter(data, 1) if per_token else one_per_row)
                return Scorer(query, list(query), writers[0], torch.device("cpu"), torch.float32,
                              attribute_tokens=per_token)  # fmt: skip

            collect(rows, per_token, scorer)
            return torch.stack([torch.as_tensor(found).sum() for found in writers[0].scores])

        return run

    return prepare


OURS = "exact, forward mode"  # what the others are compared with
METHODS: dict[str, tuple[str | None, Callable]] = {
    "forward pass": (None, forward_only),
    OURS: (None, ours("forward")),
    "exact, central difference": (None, ours("central")),
    "kronfluence, a score per row": ("kronfluence", kronfluence(per_token=False)),
    "kronfluence, a score per position": ("kronfluence", kronfluence(per_token=True)),
    "bergson, a score per row": ("bergson", bergson(per_token=False)),
    "bergson, a score per position": ("bergson", bergson(per_token=True)),
    "dattri, a score per row and query": ("dattri", dattri),
}


def measure(name: str, rows: int, queries: int, length: int, repeats: int) -> dict:
    run = METHODS[name][1](*batches(rows, queries, length))
    scores = run()
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        run()
        seconds.append(time.monotonic() - started)
    return {"seconds": sorted(seconds)[len(seconds) // 2], "peak_mb": peak_mb_of(run), "scores": scores.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    sizes = (arguments.rows, arguments.queries, arguments.length)
    found: dict[str, dict] = {}
    expected = torch.zeros(())
    for name, (package, _) in METHODS.items():
        if package is None or importlib.util.find_spec(package):
            found[name] = in_own_process(measure, name, *sizes, arguments.repeats)
            found[name]["x_forward"] = found[name]["seconds"] / found["forward pass"]["seconds"]
            scores = torch.tensor(found[name].pop("scores"))
            if name == OURS:
                expected = scores
            elif name != "forward pass":
                difference = (scores - expected).abs().max() / expected.abs().max()
                found[name]["largest_difference"] = float(difference)
            # A later one may not end: what there is stays.
            write_result(arguments.json, {"rows": sizes[0], "queries": sizes[1], "length": sizes[2], "results": found})
    rows = [
        [name, f"{m['seconds']:.1f}", f"{m['x_forward']:.1f}", f"{m['peak_mb']:,.0f}",
         f"{m['largest_difference']:.1e}" if "largest_difference" in m else ""]
        for name, m in found.items()
    ]  # fmt: skip
    print_table(
        "{} rows, {} queries, T = {}".format(*sizes), ["", "s", "x forward", "peak MB", "largest difference"], rows
    )


if __name__ == "__main__":
    main()
