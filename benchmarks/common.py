"""What the benchmarks share: real text in fixed shapes, the machine's description, results as JSON."""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from alphatoken.batching import Batch, make_batch
from alphatoken.config import EMBEDDED_MODEL, DataOptions, embedded_data
from alphatoken.encode import Encoded, Encoder
from alphatoken.sources import plan_units, read_unit
from alphatoken.tokenizer import load_config, load_tokenizer

DATA_HELP = (
    "JSONL or Parquet of any format that `alphatoken score` reads; default: the embedded GSM8K rows "
    "(the full set: https://github.com/openai/grade-school-math, MIT)"
)


def encoded_rows(model: str, files: list[str]) -> list[Encoded]:
    """All rows of the files, encoded for the model; bad rows are an error here."""
    encoder = Encoder(
        load_tokenizer(model), DataOptions(max_length=4096), load_config(model).get_text_config().vocab_size
    )
    return [encoder.encode(row.data) for unit in plan_units(files) for row in read_unit(unit)]


def embedded_file(name: str) -> str:
    return str(embedded_data() / name)


def rows_parser(description: str | None) -> argparse.ArgumentParser:
    """For a benchmark that scores some rows along a direction."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data", help=DATA_HELP, default=embedded_file("train.jsonl"))
    parser.add_argument("--validation", help=DATA_HELP, default=embedded_file("validation.jsonl"))
    parser.add_argument("--rows", type=int, default=48, help="of the data, the first ones")
    return parser


def packed_batch(rows: list[Encoded], batch_size: int, length: int) -> Batch:
    """Real text in a fixed shape: token streams cut to `length`, the second half of each is the response."""
    stream = [token for row in rows for token in row.input_ids]
    if len(stream) < batch_size * length:
        stream *= -(-batch_size * length // len(stream))
    ids = [stream[i * length : (i + 1) * length] for i in range(batch_size)]
    return make_batch(ids, [[t >= length // 2 for t in range(length)] for _ in ids])


def machine() -> dict:
    """Where the figures come from."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _status_kb(key: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return None


def resident_kb() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    return _status_kb("VmRSS:")


def peak_kb() -> int:
    """The most memory that this process has had."""
    return _status_kb("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_freed_memory() -> None:
    """What loading has used and freed goes back to the system; kept, it would hide what a method needs."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def in_own_process(call: Callable, *arguments: Any) -> Any:
    """What `call` returns, run where nothing else was before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def peak_mb_of(call: Callable[[], object]) -> float:
    """The most memory of this process during the call, above what it has now."""
    return_freed_memory()
    with suppress(OSError):  # the system's peak never falls: the kernel clears it, where it can
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_kb() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (peak_kb() - before) / 1024


def write_result(path: str | None, result: dict) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result | {"machine": machine()}, indent=2) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
