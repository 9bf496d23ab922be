"""Time and memory of an in-run training step over a plain one, on the same batches of real rows.

    python benchmarks/in_run_speed.py [--dtype float32] [--json FILE]

Plain SFT (TRL's trainer and head), in-run with both estimators at K = 3, and the paper's own procedure written plainly,
in turn in one process. In-run computes logits at response positions only and drops half of the tokens, which TRL's head
does not use on CPUs: the line without values tells how much of a difference is the head's.
A refresh of the validation direction is timed apart and shared out over the steps between two refreshes. Memory is the
peak of a fresh process, with weights, gradients and optimizer in it.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from common import DATA_HELP, embedded_file, encoded_rows, peak_kb, print_table, write_result
from paper_procedure import paper_values
from transformers import TrainerCallback

from alphatoken import storage
from alphatoken.batching import make_batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.encode import Encoded
from alphatoken.model import load_model
from alphatoken.train_config import TrainConfig
from pipelines.in_run import as_batch
from pipelines.train_worker import build_trainer

K3 = "last-layers:3"
PLAIN, PAPER = "plain SFT", "the paper's procedure"
MODES: dict[str, dict] = {
    PLAIN: {},
    # The control: in-run's loss head (logits of response tokens only), every token kept, nothing valued.
    "the same loss head, no values": {"in_run": True, "plain_steps": 10**6},
    "in-run, value_propagation, K = 3": {"in_run": True, "estimator": "value_propagation", "parameters": K3},
    "in-run, exact, K = 3": {"in_run": True, "estimator": "exact", "parameters": K3},
}
WARM_UP = 1


class StepTimes(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, its batch included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def write_rows(rows: list[Encoded], path: str) -> None:
    """Rows on which every response token is kept."""
    records = [
        {"input_ids": row.input_ids, "response_mask": row.response_mask,
         "labels": [t if m else -100 for t, m in zip(row.input_ids, row.response_mask, strict=True)]}
        for row in rows
    ]  # fmt: skip
    storage.write_table(pa.Table.from_pylist(records), path)


def trainer_of(arguments: argparse.Namespace, mode: str, folder: str, steps: int):
    live = MODES[mode] and {"validation": [arguments.validation], "refresh_every": 10**6, "keep_fraction": 0.5}
    config = TrainConfig(
        model=arguments.model, data=[folder], output=folder, per_device_batch_size=arguments.batch_size,
        max_steps=steps, dtype=arguments.dtype, learning_rate=1e-6, **MODES[mode], **live,
    )  # fmt: skip
    shard = f"{folder}/rows.parquet"
    settings = {
        "shards": [shard], "columns": storage.read_schema(shard).names, "stored_reference": False,
        "evaluation_shards": [],
    }  # fmt: skip
    return build_trainer(config, settings, f"{folder}/trainer")


def run(arguments: argparse.Namespace, mode: str, folder: str) -> dict:
    """{steps: seconds of each after the first, refresh: seconds of a refresh}."""
    trainer = trainer_of(arguments, mode, folder, WARM_UP + arguments.steps)
    times, refresh = StepTimes(), [0.0]
    trainer.add_callback(times)
    if mode != PLAIN:
        plain_refresh = trainer._refresh

        def timed_refresh() -> None:
            started = time.perf_counter()
            plain_refresh()
            refresh[0] = time.perf_counter() - started

        trainer._refresh = timed_refresh
    trainer.train()
    return {"steps": times.seconds, "refresh": refresh[0]}


def paper_seconds(arguments: argparse.Namespace, folder: str) -> float:
    """What the paper's procedure adds to one step: values of one batch, validation examples in it. Once."""
    trainer = trainer_of(arguments, PLAIN, folder, 1)
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = as_batch(inputs["input_ids"], inputs["labels"] != -100)
    rows = encoded_rows(arguments.model, [arguments.validation])
    validation = make_batch([row.input_ids for row in rows], [row.response_mask for row in rows])
    model = load_model(arguments.model, "float32").model.requires_grad_(True)
    model.set_attn_implementation("eager")
    started = time.perf_counter()
    paper_values(model, batch, validation, K3, 32)
    return time.perf_counter() - started


def peak_memory(arguments: argparse.Namespace, mode: str, folder: str) -> float:
    """MB of a fresh process that takes a few steps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (arguments, mode, folder))


def _peak_memory(arguments: argparse.Namespace, mode: str, folder: str) -> float:
    trainer_of(arguments, mode, folder, 3).train()
    return peak_kb() / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP, default=embedded_file("train.jsonl"))
    parser.add_argument("--validation", help=DATA_HELP, default=embedded_file("validation.jsonl"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each block")
    parser.add_argument("--blocks", type=int, default=3, help="how often each mode has its turn")
    parser.add_argument("--refresh-every", type=int, default=10, help="steps that share a refresh of the direction")
    parser.add_argument("--skip-paper", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(encoded_rows(arguments.model, [arguments.data]), f"{folder}/rows.parquet")
        Path(folder, "trainer").mkdir()
        steps: dict[str, list[float]] = {mode: [] for mode in MODES}
        refreshes: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(arguments.blocks):
            for mode in MODES:
                found = run(arguments, mode, folder)
                steps[mode] += found["steps"]
                refreshes[mode].append(found["refresh"])
        memory = {mode: peak_memory(arguments, mode, folder) for mode in MODES}
        paper = None if arguments.skip_paper else paper_seconds(arguments, folder)
    results = {}
    for mode in MODES:
        step, refresh = statistics.median(steps[mode]), statistics.median(refreshes[mode])
        total = step + refresh / arguments.refresh_every
        results[mode] = {"step_seconds": step, "refresh_seconds": refresh, "total": total, "peak_mb": memory[mode]}
    if paper is not None:
        total = results[PLAIN]["step_seconds"] + paper
        results[PAPER] = {"step_seconds": total, "refresh_seconds": 0.0, "total": total, "peak_mb": None}
    unit = results[PLAIN]
    for found in results.values():
        found["ratio"] = found["total"] / unit["total"]
        found["memory_ratio"] = found["peak_mb"] and found["peak_mb"] / unit["peak_mb"]
    print_table(
        f"SFT, batches of {arguments.batch_size} rows, {arguments.dtype}, direction from all validation rows every "
        f"{arguments.refresh_every} steps",
        ["", "step, s", "refresh, s", "s per step", "x plain", "peak MB", "x plain"],
        [
            [mode, f"{r['step_seconds']:.2f}", f"{r['refresh_seconds']:.1f}", f"{r['total']:.2f}", f"{r['ratio']:.2f}",
             *(["-", "-"] if r["peak_mb"] is None else [f"{r['peak_mb']:,.0f}", f"{r['memory_ratio']:.2f}"])]
            for mode, r in results.items()
        ],
    )  # fmt: skip
    write_result(arguments.json, vars(arguments) | {"results": results})


if __name__ == "__main__":
    main()
