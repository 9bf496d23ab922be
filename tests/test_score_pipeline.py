"""The score job on a real local Ray: files in, SCORED folder out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from alphatoken import schema, storage
from alphatoken.config import DataOptions, DirectionConfig, FisherConfig, MaskConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.model import load_model
from alphatoken.scoring import build_estimator, score_columns
from alphatoken.sources import plan_units, read_unit
from pipelines.direction import run_direction
from pipelines.encode import make_encoder
from pipelines.fisher import run_fisher
from pipelines.mask import run_mask
from pipelines.score import run_score

WORDS = ["the", "answer", "is", "seven", "plus", "nine", "red", "beans", "per", "hour", "makes", "a", "total", "sum"]
pytestmark = pytest.mark.usefixtures("local_ray")


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    generator = random.Random(seed)

    def sentence(longest: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, longest)))

    rows = [
        {
            "id": f"row-{seed}-{i}",
            "topic": i % 3,
            "messages": [
                {"role": "user", "content": sentence(12)},
                {"role": "assistant", "content": sentence(20)},
            ],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "data": str(write_rows(folder / "data.jsonl", 60)),
        "validation": str(write_rows(folder / "validation.jsonl", 6, seed=1)),
    }


def configuration(model: str, files: dict, output, **changes) -> ScoreConfig:
    settings = {"model": model, "data": [files["data"]], "validation": [files["validation"]], "shard_tokens": 500}
    return ScoreConfig(**(settings | {"output": str(output)} | changes))


def scored_rows(folder) -> dict[str, dict]:
    rows = [row for shard in storage.list_shards(str(folder)) for row in pq.read_table(shard).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def assert_same_values(found: dict[str, dict], expected: dict[str, dict], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in ("adaptation", "stability", "logprobs"):
        scale = max(np.abs(row[name]).max() for row in expected.values()) or 1.0
        for key, row in expected.items():
            assert np.abs(np.subtract(found[key][name], row[name])).max() <= tolerance * scale, (name, key)


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "exact", "method": "forward"},
        {"estimator": "value_propagation", "parameters": "last-layers:2", "terms": True},
        {"estimator": "loss"},
    ],
    ids=lambda changes: changes["estimator"],
)
def test_shards_hold_what_the_library_computes_row_by_row(tiny_checkpoint, files, tmp_path, changes):
    config = configuration(tiny_checkpoint, files, tmp_path / "scored", keep_columns=["topic"], **changes)
    manifest = run_score(config)
    counts = manifest["counts"]
    assert counts["rows_in"] == counts["rows_out"] == 60 and counts["rows_quarantined"] == 0
    assert len(storage.list_shards(config.output)) > 2
    found = scored_rows(config.output)
    direction = storage.join(config.output, "direction.safetensors")
    estimator = build_estimator(config, load_model(tiny_checkpoint), direction)
    encoder = make_encoder(tiny_checkpoint, DataOptions())
    for source in [row for unit in plan_units(config.data) for row in read_unit(unit)][::7]:
        encoded = encoder.encode(source.data)
        row = found[source.data["id"]]
        assert row["input_ids"] == encoded.input_ids and row["response_mask"] == encoded.response_mask
        assert row["row_id"] == source.row_id and row["topic"] == str(source.data["topic"])
        ids, mask = np.array(encoded.input_ids), np.array(encoded.response_mask)
        expected = score_columns([ids], [mask], [0], estimator, 4096, torch.device("cpu"), config.terms).flat
        for name, values in expected.items():
            np.testing.assert_allclose(row[name], values, rtol=1e-4, atol=1e-5 * max(1e-6, np.abs(values).max()))


def test_actors_batches_and_order_change_nothing(tiny_checkpoint, files, tmp_path):
    one = configuration(tiny_checkpoint, files, tmp_path / "one", method="forward")
    two = configuration(
        tiny_checkpoint, files, tmp_path / "two", method="forward", num_actors="2", batch_tokens=128, shard_tokens=200
    )
    run_score(one)
    run_score(two)
    assert_same_values(scored_rows(two.output), scored_rows(one.output))


def test_datasets_reads_the_output_and_mask_runs_on_it(tiny_checkpoint, files, tmp_path):
    config = configuration(tiny_checkpoint, files, tmp_path / "scored")
    run_score(config)
    found = load_dataset("parquet", data_files=f"{config.output}/data/*.parquet", split="train")
    assert found.num_rows == 60 and found.features["adaptation"].feature.dtype == "float32"
    assert set(schema.SCORED.names) <= set(found.column_names)
    assert load_dataset(config.output, split="train").num_rows == 60
    masked = run_mask(MaskConfig(input=config.output, output=str(tmp_path / "masked"), keep_fraction=0.5))
    assert masked["counts"]["rows_out"] == 60
    assert 0.5 <= masked["counts"]["kept_fraction"] < 0.6
    dataset = load_dataset(str(tmp_path / "masked"), split="train")
    row = dataset[0]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert_trl_trains_on(dataset, tiny_checkpoint, tmp_path / "trl")


def assert_trl_trains_on(dataset, checkpoint: str, folder: Path) -> None:
    """Plain SFTTrainer, the data set as it is: the labels reach its batches and it takes steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        args=SFTConfig(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=60, report_to=[], use_cpu=True,
            logging_steps=1, save_strategy="no",
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    kept = sum(label >= 0 for row in dataset for label in row["labels"])
    assert int((batch["labels"] >= 0).sum()) == kept < sum(dataset["num_response_tokens"])
    assert trainer.train().global_step == 2


def test_bad_rows_are_quarantined_with_place_and_reason(tiny_checkpoint, files, tmp_path):
    good = Path(files["data"]).read_text().splitlines()[:8]
    empty = json.dumps({"id": "empty", "messages": [{"role": "user", "content": "hi"}]})
    lines = [good[0], "{not json", *good[1:4], empty, *good[4:], '{"other": 1}']
    data = tmp_path / "bad.jsonl"
    data.write_text("\n".join(lines) + "\n")
    config = configuration(
        tiny_checkpoint, files, tmp_path / "scored", data=[str(data)], estimator="random", validation=[]
    )
    counts = run_score(config)["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == (11, 8, 3)
    quarantine = pq.read_table(f"{config.output}/quarantine").to_pylist()
    assert {row["position"] for row in quarantine} == {1, 5, 10}
    assert all(row["source"].endswith("bad.jsonl") and row["reason"] and row["stage"] == "encode" for row in quarantine)
    assert sum(counts["quarantine_reasons"].values()) == 3


def test_truncation_is_counted(tiny_checkpoint, files, tmp_path):
    config = configuration(
        tiny_checkpoint, files, tmp_path / "scored", max_length=30, estimator="random", validation=[]
    )
    counts = run_score(config)["counts"]
    assert counts["rows_truncated"] > 0 and counts["rows_in"] == counts["rows_out"] + counts["rows_quarantined"]
    rows = scored_rows(config.output)
    assert sum(row["truncated"] for row in rows.values()) == counts["rows_truncated"]
    assert max(len(row["input_ids"]) for row in rows.values()) == 30


def test_direction_and_fisher_files_give_stability(tiny_checkpoint, files, tmp_path):
    moved = load_model(tiny_checkpoint)
    with torch.no_grad():
        for name, parameter in moved.model.named_parameters():
            if "proj" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    checkpoint = str(tmp_path / "moved")
    moved.model.save_pretrained(checkpoint)
    make_encoder(tiny_checkpoint, DataOptions()).tokenizer.save_pretrained(checkpoint)
    fisher = FisherConfig(
        model=tiny_checkpoint, prompts=[files["data"]], output=str(tmp_path / "fisher.safetensors"),
        parameters="last-layers:2", num_prompts=8, max_new_tokens=8,
    )  # fmt: skip
    assert run_fisher(fisher)["num_rows"] == 8
    direction = DirectionConfig(
        model=checkpoint, validation=[files["validation"]], output=str(tmp_path / "direction.safetensors"),
        parameters="last-layers:2", class_weights={"end-of-turn": 0.0},
    )  # fmt: skip
    assert run_direction(direction)["parameters"] == "last-layers:2"
    both = {
        "direction": direction.output,
        "validation": [],
        "fisher": fisher.output,
        "reference_model": tiny_checkpoint,
    }
    for estimator in ("exact", "value_propagation"):
        config = configuration(checkpoint, files, tmp_path / estimator, estimator=estimator, **both)
        run_score(config)
        assert any(np.any(row["stability"]) for row in scored_rows(config.output).values())
    with pytest.raises(UserError, match="another checkpoint"):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "mismatch", **both))
    with pytest.raises(UserError, match="covers --parameters last-layers:2"):
        run_score(configuration(checkpoint, files, tmp_path / "mismatch", parameters="all-linear", **both))


def test_adam_preconditioner_uses_the_training_data(tiny_checkpoint, files, tmp_path):
    plain = configuration(tiny_checkpoint, files, tmp_path / "plain")
    adam = configuration(tiny_checkpoint, files, tmp_path / "adam", preconditioner="adam", preconditioner_batches=2)
    run_score(plain)
    run_score(adam)
    one, other = scored_rows(plain.output), scored_rows(adam.output)
    first = next(iter(one))
    assert not np.allclose(one[first]["adaptation"], other[first]["adaptation"])


def test_the_same_command_again_changes_nothing_and_another_is_refused(tiny_checkpoint, files, tmp_path):
    config = configuration(tiny_checkpoint, files, tmp_path / "scored", estimator="loss", validation=[])
    first = run_score(config)
    stamps = {shard: os.stat(shard).st_mtime_ns for shard in storage.list_shards(config.output)}
    assert run_score(config) == first
    assert stamps == {shard: os.stat(shard).st_mtime_ns for shard in storage.list_shards(config.output)}
    with pytest.raises(UserError, match="estimator: loss -> entropy"):
        run_score(config.model_copy(update={"estimator": "entropy"}))


def test_a_killed_driver_loses_nothing(tiny_checkpoint, files, tmp_path):
    """SIGKILL after some shards are committed; the same command finishes, and every row is there once."""
    data = write_rows(tmp_path / "many.jsonl", 300, seed=5)
    output = tmp_path / "scored"
    command = [
        sys.executable, "-m", "jobs.main", "score", "--model", tiny_checkpoint, "--data", str(data), "--validation",
        files["validation"], "--output", str(output), "--method", "forward", "--shard-tokens", "200",
        "--batch-tokens", "64",
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list((output / "commits").glob("*.json")) if output.exists() else []) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "ended or hung before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name for path in (output / "commits").glob("*.json")}
    assert not (output / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "data").glob("*.parquet")}
    config = ScoreConfig(
        model=tiny_checkpoint, data=[str(data)], validation=[files["validation"]], output=str(output),
        method="forward", shard_tokens=200, batch_tokens=64,
    )  # fmt: skip
    counts = run_score(config)["counts"]
    assert counts["rows_in"] == counts["rows_out"] == 300
    for name in before:  # finished work was kept, not done again
        shard = f"train-{name.removesuffix('.json')}.parquet"
        assert (output / "data" / shard).stat().st_mtime_ns == kept[shard]
    undisturbed = config.model_copy(update={"output": str(tmp_path / "undisturbed")})
    run_score(undisturbed)
    assert_same_values(scored_rows(output), scored_rows(undisturbed.output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"validation": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"parameters": "last-layers:99"}, "only 4"),
        ({"class_weights": {"vowels": 0.0}}, "vowels"),
        ({"direction": "nowhere.safetensors", "validation": []}, "nowhere.safetensors"),
    ],
)
def test_mistakes_are_one_clear_sentence(tiny_checkpoint, files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "scored", **changes))


def test_a_pickle_is_refused_unread(tiny_checkpoint, files, tmp_path):
    evil = tmp_path / "direction.safetensors"
    torch.save({"a": torch.zeros(1)}, evil)
    with pytest.raises(UserError, match="not a direction file"):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "s", direction=str(evil), validation=[]))
