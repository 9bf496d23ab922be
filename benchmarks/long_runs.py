"""Do memory and speed stay the same over a long run? A million rows masked, a hundred thousand scored by a tiny model.

    python benchmarks/long_runs.py [--mask-rows 1000000] [--score-rows 100000] [--json FILE]

A thread looks at the private memory (RssAnon: without the object store, which all share) of the driver, of Ray's
workers and of Ray's own servers every second. The table has the most of each while each tenth of the rows was done,
and the speed of that tenth. Rows are made up; the model is random, so its values mean nothing.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":  # `python benchmarks/long_runs.py`: the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alphatoken.config import ScoreConfig
from alphatoken.mask_config import MaskConfig
from benchmarks.common import print_table, write_result
from benchmarks.mask_speed import write_folder

PARTS = 10
SERVERS = ("raylet", "gcs_server")
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def private_mb(pid: str) -> float:
    """0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


def memory() -> dict[str, float]:
    """MB of the driver, of the largest worker, of all workers together, and of Ray's servers."""
    found = {"driver": private_mb(str(os.getpid())), "largest worker": 0.0, "workers": 0.0, "servers": 0.0}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if command.startswith("ray::"):
            size = private_mb(folder.name)
            found["largest worker"] = max(found["largest worker"], size)
            found["workers"] += size
        elif any(server in command.split("\0")[0] for server in SERVERS):
            found["servers"] += private_mb(folder.name)
    return found


class Watch:
    """Memory every second, and when how many rows were done."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.samples: list[tuple[float, dict[str, float]]] = []
        self.done: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def rows(self, count: float) -> None:
        self.done.append((time.monotonic() - self.started, count))

    def _look(self) -> None:
        while not self._stop.wait(1.0):
            self.samples.append((time.monotonic() - self.started, memory()))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def parts(self, total: int) -> list[dict[str, float]]:
        """Per tenth of the rows: rows per second, and the most memory of each kind of process while it was done."""
        times, counts = zip(*self.done, strict=True)
        ends = [float(np.interp(total * part / PARTS, counts, times)) for part in range(1, PARTS + 1)]
        found = []
        for begin, end in pairwise([times[0], *ends]):
            within = [sizes for when, sizes in self.samples if begin <= when <= end]
            most = {name: max(sizes[name] for sizes in within) for name in within[0]} if within else {}
            found.append({"seconds": end - begin, "rows_per_second": total / PARTS / max(end - begin, 1e-9)} | most)
        return found


def tiny_model(folder: str) -> str:
    """A random Llama of two layers and a tokenizer for arithmetic, saved."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    random = np.random.default_rng(0)
    tokenizer.train_from_iterator((json.dumps(problem(random)) for _ in range(500)), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[1], pad_token=special[1])
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=wrapped.eos_token_id, pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def problem(random: np.random.Generator) -> dict[str, str]:
    """A sum of 2 to 12 numbers, worked out number by number."""
    numbers = random.integers(1, 500, size=random.integers(2, 13)).tolist()
    sums = np.cumsum(numbers).tolist()
    steps = [f"{a} + {b} = {c}" for a, b, c in zip(sums, numbers[1:], sums[1:], strict=False)]
    return {"prompt": "Add " + ", ".join(map(str, numbers)) + ".", "completion": "; ".join(steps) + "."}


def write_problems(path: Path, rows: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        file.writelines(json.dumps(problem(random)) + "\n" for _ in range(rows))
    return str(path)


def mask_run(rows: int, folder: str) -> list[dict[str, float]]:
    from pipelines.mask import run_mask

    shards = write_folder(f"{folder}/scored", rows, shard_rows=5_000)
    with Watch() as watch:
        config = MaskConfig(input=f"{folder}/scored", output=f"{folder}/masked")
        run_mask(config, lambda done, total: watch.rows(rows * done / len(shards)))
    return watch.parts(rows)


def score_run(rows: int, folder: str) -> list[dict[str, float]]:
    from pipelines.score import run_score

    config = ScoreConfig(
        model=tiny_model(f"{folder}/model"),
        data=[write_problems(Path(folder) / "train.jsonl", rows, seed=1)],
        validation=[write_problems(Path(folder) / "validation.jsonl", 64, seed=2)],
        output=f"{folder}/scored",
        num_actors="2",
    )
    with Watch() as watch:
        run_score(config, lambda counts: watch.rows(counts["rows_in"]))
    return watch.parts(rows)


def show(name: str, rows: int, parts: list[dict[str, float]]) -> None:
    columns = ["driver", "largest worker", "workers", "servers"]
    lines = [
        [f"{number}/{PARTS}", f"{part['rows_per_second']:,.0f}", *(f"{part.get(name, 0):,.0f}" for name in columns)]
        for number, part in enumerate(parts, start=1)
    ]
    print_table(f"{name}, {rows:,} rows", ["part", "rows/s", *(f"{name}, MB" for name in columns)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask-rows", type=int, default=1_000_000)
    parser.add_argument("--score-rows", type=int, default=100_000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    runs: list[tuple[str, int, Callable[[int, str], list[dict[str, float]]]]] = [
        ("mask", arguments.mask_rows, mask_run),
        ("score", arguments.score_rows, score_run),
    ]
    results = {}
    for name, rows, run in runs:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {"rows": rows, "parts": run(rows, folder)}
        show(name, rows, results[name]["parts"])
    write_result(arguments.json, {"results": results})


if __name__ == "__main__":
    main()
