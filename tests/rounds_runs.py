"""What the tests of rounds share: a tiny model, rows of words, runs on one thread."""

import json
import random
from pathlib import Path

import pyarrow as pa

from alphatoken import storage
from alphatoken.rounds_config import RoundsConfig
from pipelines.train import read_metrics
from tests.masked_folder import write_model

WORDS = ["one", "two", "three", "four", "five", "apples", "pears", "are", "is", "have", "of", "the", "sum", "makes"]


def write_rows(path: Path, count: int, seed: int) -> str:
    draw = random.Random(seed)
    with open(path, "w") as file:
        for number in range(count):
            prompt, answer = (" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) for _ in range(2))
            file.write(json.dumps({"id": f"r{number}", "prompt": prompt, "completion": " " + answer}) + "\n")
    return str(path)


def make_inputs(folder: Path) -> dict:
    return {
        "model": write_model(folder / "model"),
        "data": [write_rows(folder / "data.jsonl", 30, 0)],
        "validation": [write_rows(folder / "validation.jsonl", 5, 1)],
    }


def use_one_thread(monkeypatch) -> None:
    """Tiny tensors on a shared machine: more threads only wait for one another."""
    monkeypatch.setattr("pipelines.train.torch_threads", lambda *_: 1)
    monkeypatch.setattr("pipelines.rounds.torch_threads", lambda *_: 1)


def config_of(inputs: dict, output: Path, **changes) -> RoundsConfig:
    settings = {
        "per_device_batch_size": 4, "learning_rate": 1e-3, "max_steps": 10, "plain_steps": 2, "refresh_every": 3,
        "save_steps": 3, "schedule": "constant", "rule": "share",
    }  # fmt: skip
    return RoundsConfig(**inputs, output=str(output), **(settings | changes))


def windows_of(output: str) -> list[tuple[dict, pa.Table]]:
    folders = sorted(Path(output, "windows").iterdir())
    summaries = [json.loads((folder / "window.json").read_text()) for folder in folders]
    return [(found, pa.concat_tables(map(storage.read_table, found["shards"]))) for found in summaries]


def weights_at(output: str, step: int) -> str:
    """The checkpoint that a run left at this step: a model folder. Runs save where a window begins."""
    for folder in Path(output, "checkpoints", "run").iterdir():
        state = folder / "trainer_state.json"
        if state.exists() and json.loads(state.read_text())["global_step"] == step:
            return str(folder)
    raise AssertionError(f"no checkpoint of step {step}")


def losses_of(output: str) -> list[float]:
    lines = [line for line in read_metrics(f"{output}/metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
