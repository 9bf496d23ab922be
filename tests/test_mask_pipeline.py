import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.mask_config import MaskConfig
from alphatoken.run_folder import RunFolder
from pipelines.cluster import user_errors
from pipelines.mask import run_mask, unbalanced
from tests.scored_folder import END_OF_TURN, write_scored_folder

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def scored(tmp_path):
    folder = str(tmp_path / "scored")
    return folder, write_scored_folder(folder)


def masked(folder: str) -> pa.Table:
    return pa.concat_tables([storage.read_table(uri) for uri in storage.list_shards(folder)])


def flat(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def test_sequence_scope_end_to_end(scored, tmp_path, monkeypatch, caplog):
    source, rows = scored
    output = str(tmp_path / "masked")
    shards_done = []
    with caplog.at_level(logging.WARNING):
        manifest = run_mask(
            MaskConfig(input=source, output=output), lambda done, total: shards_done.append((done, total))
        )
    assert "frozen" in caplog.text and "stale" in caplog.text
    assert shards_done == [(1, 3), (2, 3), (3, 3)]
    names = [storage.name_of(uri) for uri in storage.list_shards(output)]
    assert names == [storage.name_of(uri) for uri in storage.list_shards(source)]

    table = masked(output)
    assert table.select(rows.column_names).equals(rows)
    labels, inside = flat(table, "labels"), flat(table, "response_mask")
    counts = manifest["counts"]
    assert counts["rows_in"] == counts["rows_out"] == 60
    assert counts["rows_quarantined"] == counts["rows_dropped_sequences"] == 0
    assert counts["response_tokens"] == inside.sum()
    assert counts["kept_tokens"] == (labels != -100).sum()
    assert counts["kept_fraction"] == pytest.approx(counts["kept_tokens"] / counts["response_tokens"], abs=1e-6)
    expected = sum(math.ceil(0.8 * count - 1e-9) for count in rows["num_response_tokens"].to_pylist())
    assert counts["kept_tokens"] == expected
    assert manifest["fingerprints"]["model"] == "abc" and manifest["scored"]["config"]["model"] == "m"
    assert storage.list_names(output) == ["README.md", "data", "manifest.json", "run.json", "token_classes.parquet"]

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = str(tmp_path / "cache")
    files = datasets.load_dataset("parquet", data_files=f"{output}/data/*.parquet", split="train", cache_dir=cache)
    whole = datasets.load_dataset(output, cache_dir=cache)
    assert list(whole) == ["train"]
    assert files["labels"][:3] == whole["train"]["labels"][:3] == table["labels"].to_pylist()[:3]
    assert len(files) == len(whole["train"]) == 60


def test_data_set_scope_with_drops_protection_and_weights(scored, tmp_path):
    source, rows = scored
    output = str(tmp_path / "masked")
    config = MaskConfig(
        input=source, output=output, scope="dataset", keep_fraction=0.3, drop_sequences=0.25,
        protect=["end-of-turn"], weights=True, stability_weight=0.5,
    )  # fmt: skip
    manifest = run_mask(config)
    table = masked(output)
    kept = flat(table, "labels") != -100
    ends = flat(table, "response_mask") & (flat(table, "input_ids") == END_OF_TURN)
    others = flat(table, "response_mask") & ~ends
    inside, is_end = flat(rows, "response_mask"), flat(rows, "input_ids") == END_OF_TURN
    assert manifest["kept_by_class"] == {  # of all rows: those that are dropped have no kept tokens
        name: {"response_tokens": found.sum(), "kept_tokens": (mine & kept).sum()}
        for name, mine, found in (("word", others, inside & ~is_end), ("end-of-turn", ends, inside & is_end))
    }
    counts = manifest["counts"]
    assert counts["response_tokens"] == inside.sum() and counts["kept_tokens"] == kept.sum()
    assert counts["response_tokens"] - counts["dropped_row_tokens"] == flat(table, "response_mask").sum()
    assert counts["kept_fraction"] == pytest.approx(kept.sum() / inside.sum(), abs=1e-6)
    means = rows["mean_adaptation"].to_numpy() + np.float32(0.5) * rows["mean_stability"].to_numpy()
    dropped = np.argsort(means)[:15]
    assert manifest["counts"]["rows_dropped_sequences"] == 15 and manifest["counts"]["rows_out"] == 45
    assert set(table["row_id"].to_pylist()) == set(range(60)) - set(dropped.tolist())
    quarantine = [
        storage.read_table(storage.join(output, "quarantine", name))
        for name in storage.list_names(storage.join(output, "quarantine"))
    ]
    left_out = pa.concat_tables(quarantine)
    assert sorted(left_out["row_id"].to_pylist()) == sorted(dropped.tolist())
    assert set(left_out["stage"].to_pylist()) == {"mask"}
    assert all("dropped sequence: its mean value -" in reason for reason in left_out["reason"].to_pylist())

    values, inside = flat(table, "value"), flat(table, "response_mask")
    end = inside & (flat(table, "input_ids") == END_OF_TURN)
    eligible = np.sort(values[inside & ~end])[::-1]
    tau = eligible[math.ceil(0.3 * len(eligible) - 1e-9) - 1]
    assert manifest["threshold"] == tau
    np.testing.assert_array_equal(flat(table, "labels") != -100, inside & ((values >= tau) | end))
    weights = flat(table, "weights")
    np.testing.assert_array_equal(weights == 1, flat(table, "labels") != -100)
    assert (weights[~inside] == 0).all() and weights.min() == 0


def test_a_token_class_that_is_hardly_kept_is_named():
    by_class = {
        "words": {"response_tokens": 900, "kept_tokens": 780},
        "end-of-turn": {"response_tokens": 100, "kept_tokens": 20},
        "digits": {"response_tokens": 3, "kept_tokens": 0},
    }
    (sentence,) = unbalanced(by_class, 0.8)
    assert "only 20% of the end-of-turn tokens are kept, of all response tokens 80%" in sentence
    assert unbalanced(by_class, 0.45) == []
    assert len(unbalanced(by_class, 0.45, stays=0.5)) == 1  # 90% of what is in rows that stay, and 40%
    few = {"end-of-turn": {"kept_tokens": 0, "response_tokens": 6}, "digits": {"kept_tokens": 0, "response_tokens": 2}}
    (sentence,) = unbalanced(few, 0.64)  # of 6, all go by chance once in 460 times; of 2, once in 8
    assert sentence.startswith("only 0% of the end-of-turn tokens are kept")


def test_finished_resumed_and_changed_runs(scored, tmp_path):
    source, _ = scored
    output = str(tmp_path / "masked")
    config = MaskConfig(input=source, output=output)
    first = run_mask(config)
    assert run_mask(config) == first  # nothing is done again, not even the time stamp changes
    assert run_mask(MaskConfig(input=os.path.relpath(source), output=output)) == first
    with pytest.raises(UserError, match="config.keep_fraction: 0.8 -> 0.5"):
        run_mask(MaskConfig(input=source, output=output, keep_fraction=0.5))
    before = masked(output)

    storage.remove_file(storage.join(output, "manifest.json"))
    again = run_mask(config)
    assert again["counts"] == first["counts"] and masked(output).equals(before)

    replaced = run_mask(MaskConfig(input=source, output=output, keep_fraction=0.5, overwrite=True))
    assert replaced["counts"]["kept_fraction"] < first["counts"]["kept_fraction"]


def test_a_cut_off_run_keeps_its_finished_shards(scored, tmp_path, monkeypatch):
    source, _ = scored
    output = str(tmp_path / "masked")
    config = MaskConfig(input=source, output=output)

    def die(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_mask(config, die)
    committed = [record["shard"] for record in RunFolder(output).commits()]
    assert committed
    stamps = {name: os.stat(storage.join(output, "data", name)).st_mtime_ns for name in committed}
    calls = []
    manifest = run_mask(config, lambda done, total: calls.append(done))
    assert len(calls) == 3 - len(committed)
    assert manifest["counts"]["rows_out"] == 60
    assert all(os.stat(storage.join(output, "data", name)).st_mtime_ns == stamp for name, stamp in stamps.items())


@pytest.mark.full
def test_the_job_as_a_file_from_another_folder(scored, tmp_path):
    """With its own Ray, whose workers have to find the packages."""
    command = [sys.executable, str(Path(__file__).parents[1] / "jobs" / "mask.py"), "--json"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [*command, "--input", "scored", "--output", "masked", "--protect", "end-of-turn"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["rows_out"] == 60
    assert len(storage.list_shards(str(tmp_path / "masked"))) == 3


def test_preset():
    paper = MaskConfig(input="i", output="o", preset="paper")
    assert (paper.keep_fraction, paper.stability_weight) == (0.5, 1.5)
    assert MaskConfig(input="i", output="o", preset="paper", keep_fraction=0.7).keep_fraction == 0.7


def test_wrong_inputs(scored, tmp_path):
    source, _ = scored
    output = str(tmp_path / "masked")
    with pytest.raises(UserError, match="is the input folder"):
        run_mask(MaskConfig(input=source, output=source + "/", overwrite=True))
    with pytest.raises(UserError, match="there are word, newline, end-of-turn"):
        run_mask(MaskConfig(input=source, output=output, protect=["newlin"]))
    assert not storage.exists(output)
    run_mask(MaskConfig(input=source, output=output))
    with pytest.raises(UserError, match="was written by mask"):
        run_mask(MaskConfig(input=output, output=str(tmp_path / "other")))
    storage.remove_file(storage.join(source, "manifest.json"))
    with pytest.raises(UserError, match="has not finished"):
        run_mask(MaskConfig(input=source, output=output))
    with pytest.raises(UserError, match="does not exist or is empty"):
        run_mask(MaskConfig(input=source + "x", output=output))


def test_errors_of_tasks_come_out_as_one_sentence(scored, tmp_path):
    source, _ = scored
    storage.write_bytes(b"PAR1 broken", storage.list_shards(source)[1])
    with pytest.raises(UserError) as caught:
        run_mask(MaskConfig(input=source, output=str(tmp_path / "masked")))
    assert "is not a readable Parquet file" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="other"), user_errors():
        raise RuntimeError("other")
