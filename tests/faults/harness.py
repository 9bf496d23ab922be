"""Score and mask runs with faults, and what is left of the data afterwards, compared with an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from alphatoken.config import ScoreConfig
from alphatoken.mask_config import MaskConfig
from jobs.cli import INTERRUPTED
from pipelines.mask import run_mask
from pipelines.score import run_score
from tests.faults.injection import Faults, faulty_actors, tell
from tests.test_train_pipeline import workers_of

ROOT = Path(__file__).parents[2]
WORDS = ["the", "answer", "is", "seven", "plus", "nine", "red", "beans", "per", "hour", "makes", "a", "total", "sum"]
OVERFLOWING = "~"  # the model has no finite embedding for it
TOLERANCE = 1e-5
RAY_TOO_SLOW = "timed out during startup"


def write_model(folder: Path) -> str:
    """A tiny random model that overflows on one token."""
    import torch

    from tests.tiny_models import tiny_model
    from tests.tiny_tokenizers import CHATML, byte_level

    tokenizer = byte_level(CHATML)
    model = tiny_model("qwen2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, num_hidden_layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(OVERFLOWING)] = torch.inf
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, count: int, seed: int, pairs: bool = False, flawed: bool = True) -> str:
    """One row in fifteen overflows, one in twenty is no JSON. Row ids are line numbers."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 18))) for _ in range(3 if pairs else 2)]
            if flawed and draw.random() < 1 / 15:
                texts[-1] += f" {OVERFLOWING}"
            names = ("prompt", "chosen", "rejected") if pairs else ("prompt", "completion")
            row = json.dumps({"id": f"r{number}"} | dict(zip(names, texts, strict=True)))
            file.write(f"{'{broken' if flawed and draw.random() < 1 / 20 else row}\n")
    return str(path)


@dataclass(frozen=True)
class Left:
    """What is in a finished scored folder and the masked one made from it, by row id."""

    rows: list[int]  # of all data shards
    aside: list[int]  # of all quarantine shards
    reasons: dict[int, str]
    values: dict[int, dict[str, np.ndarray]]
    masks: dict[int, dict[str, list]]


@dataclass
class Findings:
    """What faults did to a run; empty where the promise was kept."""

    lost: list[int] = field(default_factory=list)  # in the input, neither in the output nor in quarantine
    twice: list[int] = field(default_factory=list)
    aside: list[int] = field(default_factory=list)  # in quarantine, although nothing is wrong with them
    not_finite: list[int] = field(default_factory=list)
    other_values: list[int] = field(default_factory=list)
    other_masks: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Bench:
    """Inputs, and the undisturbed run that others are compared with."""

    def __init__(self, folder: Path, rows: int, seed: int = 0, pairs: bool = False, model: str | None = None) -> None:
        self.folder, self.rows, self.pairs = folder, rows, pairs
        folder.mkdir(parents=True, exist_ok=True)
        self.model = model or write_model(folder / "model")
        self.data = write_rows(folder / "data.jsonl", rows, seed, pairs)
        self.validation = write_rows(folder / "validation.jsonl", 4, seed + 1, flawed=False)
        self.direction: str | None = None
        reference = self.config("reference")
        self.score(reference)
        self.direction = f"{reference.output}/direction.safetensors"
        self.expected = self.left(reference)

    def config(self, name: str, **changes) -> ScoreConfig:
        settings = {"model": self.model, "data": [self.data], "output": str(self.folder / name), "shard_tokens": 300,
                    "batch_tokens": 128, "method": "forward"}  # fmt: skip
        settings |= {"direction": self.direction} if self.direction else {"validation": [self.validation]}
        return ScoreConfig(**(settings | changes))

    def score(self, config: ScoreConfig, faults: Faults | None = None, progress: Callable | None = None) -> dict:
        tell(config.output, faults)
        with faulty_actors():
            return run_score(config, progress)

    def mask_config(self, config: ScoreConfig) -> MaskConfig:
        return MaskConfig(input=config.output, output=f"{config.output}-masked", keep_fraction=0.6)

    def left(self, config: ScoreConfig) -> Left:
        """Masks the scored folder, if that was not done, and reads both."""
        masking = self.mask_config(config)
        run_mask(masking)
        scored = [row for shard in _shards(config.output) for row in pq.read_table(shard).to_pylist()]
        masked = [row for shard in _shards(masking.output) for row in pq.read_table(shard).to_pylist()]
        refused = [row for shard in _shards(config.output, "quarantine") for row in pq.read_table(shard).to_pylist()]
        branches = ("chosen_", "rejected_") if self.pairs else ("",)
        values = [f"{branch}{name}" for branch in branches for name in ("adaptation", "stability", "logprobs")]
        masks = ["chosen_mask", "rejected_mask"] if self.pairs else ["labels"]
        return Left(
            [row["row_id"] for row in scored],
            [row["row_id"] for row in refused],
            {row["row_id"]: row["reason"] for row in refused},
            {row["row_id"]: {name: np.array(row[name]) for name in values} for row in scored},
            {row["row_id"]: {name: row[name] for name in masks} for row in masked},
        )

    def findings(self, config: ScoreConfig, bad: tuple[int, ...] = ()) -> Findings:
        """What differs from the undisturbed run; `bad`: rows that the faults are about, in quarantine if anywhere."""
        found, expected = self.left(config), self.expected
        times = Counter([*found.rows, *found.aside])
        scale = {name: max(np.abs(row[name]).max() for row in expected.values.values())
                 for name in next(iter(expected.values.values()))}  # fmt: skip
        both = [row for row in found.rows if row in expected.values]
        return Findings(
            lost=sorted(set(range(self.rows)) - set(times)),
            twice=sorted(row for row, count in times.items() if count > 1),
            aside=sorted(set(found.aside) - set(expected.aside) - set(bad)),
            not_finite=[row for row in found.rows if not all(np.isfinite(v).all() for v in found.values[row].values())]
            + sorted(set(found.rows) & set(expected.aside)),
            other_values=[row for row in both if any(
                np.abs(found.values[row][name] - expected.values[row][name]).max() > TOLERANCE * scale[name]
                for name in scale)],
            other_masks=[row for row in both if found.masks.get(row) != expected.masks.get(row)],
        )  # fmt: skip

    def good_rows(self, draw: random.Random, count: int) -> tuple[int, ...]:
        return tuple(draw.sample(self.expected.rows, count))


def _shards(folder: str, kind: str = "data") -> list[Path]:
    return sorted(Path(folder, kind).glob("*.parquet"))


def commits(config) -> int:
    return len(list(Path(config.output, "commits").glob("*.json")))


class ActorKiller:
    """Progress that kills -9 one scoring actor of this process after so many shards (each number once)."""

    def __init__(self, draw: random.Random, after: list[int]) -> None:
        self.draw, self.left = draw, sorted(after)
        self.shards = self.killed = 0

    def __call__(self, counts: dict) -> None:
        self.shards += 1
        while self.left and self.shards >= self.left[0]:
            self.left.pop(0)
            victims = workers_of(psutil.Process(), "Scorer")
            if victims:
                self.draw.choice(victims).kill()
                self.killed += 1


def cut_off(config: ScoreConfig | MaskConfig, kind: signal.Signals, shards: int) -> int | None:
    """Run a stage in a process of its own, and send it a signal when it has committed so many shards more; its exit
    code. SIGINT goes to the whole foreground group, as a terminal's Ctrl-C does; the others to the driver alone. None
    where it was done before, or where the machine was too busy for Ray to start.
    """
    stage = "score" if isinstance(config, ScoreConfig) else "mask"
    path = Path(f"{config.output}.config.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json(exclude_defaults=True))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with Path(f"{config.output}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.driver", stage, str(path)], cwd=ROOT, stdout=log, stderr=log,
            env=environment | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
    wanted, deadline = commits(config) + shards, time.monotonic() + 240
    while commits(config) < wanted:
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if process.poll() is None:
        if kind == signal.SIGINT:
            os.killpg(process.pid, kind)
        else:
            process.send_signal(kind)
    code = process.wait(timeout=120)  # its actors may live a moment longer, while the next command begins
    said = Path(f"{config.output}.log").read_text()
    if Path(config.output, "manifest.json").exists() or RAY_TOO_SLOW in said:
        return None
    assert code in (-kind, INTERRUPTED), said[-3000:]
    return code
