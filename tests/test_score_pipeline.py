"""The score job on a real local Ray: files in, SCORED folder out."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from alphatoken import schema, storage, tensor_file
from alphatoken.batching import make_batch
from alphatoken.config import DataOptions, DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.fisher_config import FisherConfig
from alphatoken.mask_config import MaskConfig
from alphatoken.model import load_model
from alphatoken.model_encoder import make_encoder
from alphatoken.scoring import build_estimator, score_columns
from alphatoken.sources import plan_units, read_unit
from alphatoken.suspects import LossProfile, validation_losses
from alphatoken.token_classes import TOKEN_CLASS_NAMES, class_of_ids
from pipelines.direction import run_direction
from pipelines.dry_run import dry_run
from pipelines.fisher import run_fisher
from pipelines.mask import run_mask
from pipelines.score import LARGEST_SHARD, SMALLEST_SHARD, run_score, shard_tokens
from tests.masked_folder import write_model

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
            "source": f"book {i % 2}",
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
    """60 good rows with 3 bad ones among them, and validation rows."""
    folder = tmp_path_factory.mktemp("data")
    data = write_rows(folder / "data.jsonl", 60)
    good = data.read_text().splitlines()
    unanswered = json.dumps({"id": "unanswered", "messages": [{"role": "user", "content": "hi"}]})
    data.write_text("\n".join([good[0], "{not json", *good[1:4], unanswered, *good[4:], '{"other": 1}']) + "\n")
    return {"data": str(data), "validation": str(write_rows(folder / "validation.jsonl", 6, seed=1))}


@pytest.fixture(scope="module")
def scored(tiny_checkpoint, files, tmp_path_factory):
    """(configuration, manifest) of one finished run that several tests look at."""
    output = tmp_path_factory.mktemp("runs") / "scored"
    config = configuration(tiny_checkpoint, files, output, method="forward", keep_columns=["topic", "source"])
    return config, run_score(config)


def configuration(checkpoint: str, files: dict, output, **changes) -> ScoreConfig:
    settings = {"model": checkpoint, "data": [files["data"]], "validation": [files["validation"]], "shard_tokens": 500}
    return ScoreConfig(**(settings | {"output": str(output)} | changes))


def scored_rows(folder) -> dict[str, dict]:
    rows = [row for shard in storage.list_shards(str(folder)) for row in pq.read_table(shard).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def assert_library_values(config: ScoreConfig, found: dict[str, dict], every: int = 7) -> None:
    """Rows of the output against the library on one row at a time, in the same dtype."""
    direction = storage.join(config.output, "direction.safetensors")
    estimator = build_estimator(config, load_model(config.model), direction)
    encoder = make_encoder(config.model, config)
    sources = [row for unit in plan_units(config.data) for row in read_unit(unit)]
    errors, scale = {}, {}
    for source in [row for row in sources if row.data and row.data.get("id") in found][::every]:
        encoded = encoder.encode(source.data)
        row = found[source.data["id"]]
        assert row["input_ids"] == encoded.input_ids and row["response_mask"] == encoded.response_mask
        assert row["row_id"] == source.row_id and row["truncated"] == encoded.truncated
        ids, mask = np.array(encoded.input_ids), np.array(encoded.response_mask)
        expected = score_columns([ids], [mask], [0], estimator, 4096, torch.device("cpu"), config.terms).flat
        for name, values in expected.items():
            errors[name] = max(errors.get(name, 0.0), np.abs(row[name] - values).max())
            scale[name] = max(scale.get(name, 0.0), np.abs(values).max())
    assert all(errors[name] <= 1e-5 * scale[name] for name in errors), (errors, scale)


def test_exact_values_are_the_library_s_row_by_row(scored, files):
    config, manifest = scored
    counts = manifest["counts"]
    assert (counts["rows_in"], counts["rows_out"], counts["rows_quarantined"]) == (63, 60, 3)
    assert len(storage.list_shards(config.output)) > 2
    found = scored_rows(config.output)
    assert len(found) == 60
    assert_library_values(config, found, every=3)
    assert {row["topic"] for row in found.values()} == {"0", "1", "2"}
    assert {row["source"] for row in found.values()} == {"book 0", "book 1"}


def test_value_propagation_with_two_actors_and_other_batches(tiny_checkpoint, files, tmp_path):
    config = configuration(
        tiny_checkpoint, files, tmp_path / "scored", estimator="value_propagation", parameters="last-layers:2",
        terms=True, num_actors="2", batch_tokens=128, shard_tokens=200,
    )  # fmt: skip
    run_score(config)
    found = scored_rows(config.output)
    assert len(found) == 60
    assert_library_values(config, found)


def test_bad_rows_are_quarantined_with_place_and_reason(scored):
    config, manifest = scored
    quarantine = pq.read_table(f"{config.output}/quarantine").to_pylist()
    assert {row["position"] for row in quarantine} == {1, 5, 62}
    assert all(row["source"].endswith("data.jsonl") and row["reason"] for row in quarantine)
    assert {row["stage"] for row in quarantine} == {"encode"}
    assert sum(manifest["counts"]["quarantine_reasons"].values()) == 3


def test_truncation_is_counted(tiny_checkpoint, files, tmp_path):
    config = configuration(tiny_checkpoint, files, tmp_path / "scored", max_length=30, estimator="loss", validation=[])
    counts = run_score(config)["counts"]
    assert counts["rows_truncated"] > 0 and counts["rows_in"] == counts["rows_out"] + counts["rows_quarantined"]
    rows = scored_rows(config.output)
    assert sum(row["truncated"] for row in rows.values()) == counts["rows_truncated"]
    assert max(len(row["input_ids"]) for row in rows.values()) == 30
    assert_library_values(config, rows)


def test_datasets_mask_and_trl_read_the_output(scored, tiny_checkpoint, tmp_path):
    config, _ = scored
    cache = str(tmp_path / "cache")
    found = load_dataset("parquet", data_files=f"{config.output}/data/*.parquet", split="train", cache_dir=cache)
    assert found.num_rows == 60 and found.features["adaptation"].feature.dtype == "float32"
    assert set(schema.SCORED.names) <= set(found.column_names)
    assert load_dataset(config.output, split="train", cache_dir=cache).num_rows == 60
    masked = run_mask(MaskConfig(input=config.output, output=str(tmp_path / "masked"), keep_fraction=0.5))
    assert masked["counts"]["rows_out"] == 60
    assert 0.5 <= masked["counts"]["kept_fraction"] < 0.6
    dataset = load_dataset(str(tmp_path / "masked"), split="train", cache_dir=cache)
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
        parameters="last-layers:2", num_prompts=8, max_new_tokens=8, engine="transformers",
    )  # fmt: skip
    made = run_fisher(fisher)
    assert made["num_rows"] == 8
    assert run_fisher(fisher) == made | {"already_finished": True}
    same = fisher.model_copy(update={"output": str(tmp_path / "same.safetensors"), "batch_tokens": 64})
    seen: list[tuple[str, float]] = []
    run_fisher(same, lambda what, done: seen.append((what, done)))
    assert seen[-1] == ("gradients", 8) and dry_run(same)["state"] == "finished"
    one, other = (tensor_file.load(config.output, "fisher").group("fisher") for config in (fisher, same))
    for name, tensor in one.items():  # the samples are those of (seed, prompt), whoever draws them
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-9)
    direction = DirectionConfig(
        model=checkpoint, validation=[files["validation"]], output=str(tmp_path / "direction.safetensors"),
        parameters="last-layers:2", class_weights={"end-of-turn": 0.0},
    )  # fmt: skip
    assert run_direction(direction, lambda what, done: seen.append((what, done)))["parameters"] == "last-layers:2"
    assert seen[-1][0] == "checks of the direction"
    both = {
        "direction": direction.output,
        "validation": [],
        "fisher": fisher.output,
        "reference_model": tiny_checkpoint,
    }
    config = configuration(checkpoint, files, tmp_path / "scored", **both)
    run_score(config)
    assert any(np.any(row["stability"]) for row in scored_rows(config.output).values())
    with pytest.raises(UserError, match="another checkpoint"):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "mismatch", **both))
    with pytest.raises(UserError, match="covers --parameters last-layers:2"):
        run_score(configuration(checkpoint, files, tmp_path / "mismatch", parameters="all-linear", **both))


def test_what_the_direction_is_worth_is_in_the_manifest(scored):
    health = scored[1]["direction_health"]
    assert sum(share["direction"] for share in health["class_shares"].values()) == pytest.approx(1)
    assert sum(share["tokens"] for share in health["class_shares"].values()) == pytest.approx(1)
    assert -1 <= health["agreement_of_halves"] <= 1


def test_losses_of_validation_rows_are_in_the_manifest_and_mask_uses_them(scored, files, tmp_path):
    config, manifest = scored
    encoder, scoring = make_encoder(config.model, config), load_model(config.model)
    rows = [encoder.encode(row.data) for unit in plan_units(config.validation) for row in read_unit(unit)]
    batches = [make_batch([row.input_ids], [row.response_mask]) for row in rows]
    expected = LossProfile.of(validation_losses(scoring, batches, torch.from_numpy(class_of_ids(config.model))))
    found = LossProfile.from_json(manifest["loss_profile"], TOKEN_CLASS_NAMES)
    np.testing.assert_allclose(found.candidates, expected.candidates, rtol=1e-5)
    assert found.counts.tolist() == expected.counts.tolist() and found.counts[:, 0].sum() > 60
    assert found.row == pytest.approx(expected.row)
    masked = run_mask(MaskConfig(input=config.output, output=str(tmp_path / "masked")))
    assert masked["rule"] == "suspect" and masked["bounds"]["row"] == found.row
    assert masked["counts"]["rows_out"] == 60  # words are drawn alike: nothing is in excess
    assert masked["counts"]["kept_fraction"] == 1


def test_adam_preconditioner_uses_the_training_data(scored, tiny_checkpoint, files, tmp_path):
    adam = configuration(tiny_checkpoint, files, tmp_path / "adam", preconditioner="adam", preconditioner_batches=2)
    run_score(adam)
    one, other = scored_rows(scored[0].output), scored_rows(adam.output)
    first = next(iter(one))
    assert not np.allclose(one[first]["adaptation"], other[first]["adaptation"])
    saved = tensor_file.load(f"{adam.output}/direction.safetensors", "direction")
    assert saved.group("scale").keys() == saved.group("direction").keys()


def test_the_same_command_again_changes_nothing_and_another_is_refused(scored):
    config, first = scored
    stamps = {shard: os.stat(shard).st_mtime_ns for shard in storage.list_shards(config.output)}
    assert run_score(config) == first
    assert dry_run(config)["state"] == "finished"
    assert stamps == {shard: os.stat(shard).st_mtime_ns for shard in storage.list_shards(config.output)}
    with pytest.raises(UserError, match="method: forward -> central"):
        run_score(config.model_copy(update={"method": "central"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"validation": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"parameters": "last-layers:99"}, "only 4"),
        ({"class_weights": {"vowels": 0.0}}, "vowels"),
        ({"direction": "nowhere.safetensors", "validation": []}, "nowhere.safetensors"),
        ({"keep_columns": ["topic", "mean_loss"]}, "--keep-columns mean_loss: the output has a column of that name"),
        ({"keep_columns": ["labels"]}, "--keep-columns labels: the output has a column of that name"),
        ({"keep_columns": ["topic", "topic"]}, "--keep-columns topic topic: a column is named twice"),
        ({"keep_columns": ["topik"]}, "--keep-columns topik: the first row of no data file .* has id, messages, sou"),
    ],
)
def test_mistakes_are_one_clear_sentence(tiny_checkpoint, files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "scored", **changes))


def test_a_reference_with_another_vocabulary_is_refused_before_a_model_is_loaded(tiny_checkpoint, files, tmp_path):
    other = write_model(tmp_path / "other", vocab_size=600)
    (tmp_path / "other" / "model.safetensors").unlink()
    changes = {"estimator": "excess_loss", "validation": [], "reference_model": other}
    with pytest.raises(UserError, match="other has a vocabulary of 600 tokens, --model .* one of "):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "scored", **changes))


def test_a_pickle_is_refused_unread(tiny_checkpoint, files, tmp_path):
    evil = tmp_path / "direction.safetensors"
    torch.save({"a": torch.zeros(1)}, evil)
    with pytest.raises(UserError, match="not a direction file"):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "s", direction=str(evil), validation=[]))


@pytest.mark.parametrize(
    ("megabytes", "actors", "tokens"),
    [(0, 1, SMALLEST_SHARD), (1, 1, 4 * 4096), (1, 8, 2**20 // 4 // 32), (1, 64, SMALLEST_SHARD), (64, 1, 65_536),
     (4096, 1, LARGEST_SHARD)],
)  # fmt: skip
def test_shards_grow_with_the_input(monkeypatch, tiny_checkpoint, files, tmp_path, megabytes, actors, tokens):
    monkeypatch.setattr("pipelines.score.file_bytes", lambda *_: megabytes * 2**20)
    config = configuration(tiny_checkpoint, files, tmp_path, shard_tokens=None, num_actors=str(actors))
    assert shard_tokens(config, []) == tokens
    assert shard_tokens(configuration(tiny_checkpoint, files, tmp_path, shard_tokens=77), []) == 77
