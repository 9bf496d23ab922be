"""What goes into the report page; the page itself is tried in a browser in test_report_browser.py."""

import base64
import json

import numpy as np
import pyarrow as pa
import pytest

from alphatoken import report_data as report_data_module
from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.manifest import OTHERS
from alphatoken.masking import MaskPlan, mask_table
from alphatoken.report import report_page, script_json
from alphatoken.report_data import MOST_SHARDS, report_data, sample
from jobs import report as job
from tests.report_folders import HOSTILE, write_folder


def unpack(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def data_of(folder, rows=100, **more) -> dict:
    return report_data(str(folder), rows, seed=0, **({"group_by": None, "compare": None} | more))


def test_rows_of_sft_come_back_as_they_are(tmp_path):
    table = write_folder(str(tmp_path), rows=9)
    data = data_of(tmp_path)
    texts, start = data["texts"], 0
    tokens, adaptation = unpack(data["tokens"], "<i4"), unpack(data["columns"]["adaptation"], "<f4")
    for index, row in enumerate(table.to_pylist()):
        order, inside = unpack(data["orders"][index]["ids"], "<i4"), unpack(data["orders"][index]["inside"], "u1")
        assert [texts[i] for i in order] == [HOSTILE if t == 7 else f" t{t}" for t in row["input_ids"]]
        assert inside.astype(bool).tolist() == row["response_mask"]
        response = data["responses"][index]
        end = start + response["length"]
        assert (response["row"], response["branch"]) == (index, "response")
        assert [texts[i] for i in tokens[start:end]] == [texts[i] for i in order[inside.astype(bool)]]
        expected = np.float32(row["adaptation"])[row["response_mask"]]
        np.testing.assert_array_equal(adaptation[start:end], expected)
        start = end
    assert start == len(tokens)
    assert data["rows"][0]["id"] == HOSTILE
    assert data["quarantine"][0] == {"stage": "encode", "reason": "response is # tokens long", "rows": 2}


def test_reasons_add_up_to_the_rows_that_were_left_out(tmp_path, monkeypatch):
    write_folder(str(tmp_path))
    first = f"{tmp_path}/quarantine/quarantine-000000000000000.parquet"
    storage.write_bytes(storage.read_bytes(first), f"{tmp_path}/quarantine/quarantine-000000000000004.parquet")
    manifest = storage.read_json(f"{tmp_path}/manifest.json")
    counts = manifest["counts"] | {"rows_quarantined": 4, "rows_dropped_sequences": 2}
    storage.write_json(manifest | {"counts": counts}, f"{tmp_path}/manifest.json")
    both = [("encode", "response is # tokens long", 4), ("encode", "no response", 2)]
    assert [tuple(line.values()) for line in data_of(tmp_path)["quarantine"]] == both
    monkeypatch.setattr(report_data_module, "SHARED_REASONS", 1)
    monkeypatch.setattr(report_data_module, "MOST_QUARANTINE_FILES", 1)
    assert [tuple(line.values()) for line in data_of(tmp_path)["quarantine"]] == [
        ("encode", "response is # tokens long", 2),
        ("", OTHERS, 1),
        ("", "not read: quarantine files after the first 1", 3),
    ]


def test_branches_of_pairs_come_one_after_the_other(tmp_path):
    table = write_folder(str(tmp_path), rows=5, pairs=True)
    data = data_of(tmp_path)
    assert [found["branch"] for found in data["responses"]] == ["chosen", "rejected"] * 5
    logprobs, expected = unpack(data["columns"]["logprobs"], "<f4"), []
    for row in table.to_pylist():
        expected += row["chosen_logprobs"] + row["rejected_logprobs"]
    np.testing.assert_array_equal(logprobs, np.float32(expected))


def test_settings_of_a_masked_folder(tmp_path):
    table = write_folder(str(tmp_path / "scored"), rows=6)
    masked = mask_table(table, MaskPlan(0.5, 0.5), "shard").data
    folder = tmp_path / "masked"
    storage.write_table(masked, f"{folder}/data/train-000000000000000.parquet")
    classes = storage.read_bytes(f"{tmp_path}/scored/token_classes.parquet")
    storage.write_bytes(classes, f"{folder}/token_classes.parquet")
    scored = storage.read_json(f"{tmp_path}/scored/manifest.json")
    settings = {"input": "s", "keep_fraction": 0.5, "stability_weight": 0.5, "scope": "sequence", "min_value": None,
                "protect": [], "target_weights": {"math": 0.5}, "drop_sequences": 0.25}  # fmt: skip
    counts = {"rows_in": 6, "rows_out": 6, "response_tokens": 80, "kept_fraction": 0.5}
    manifest = {"stage": "mask", "created": "now", "counts": counts, "config": settings, "scored": scored}
    storage.write_json(manifest, f"{folder}/manifest.json")
    data = data_of(folder)
    known = {"threshold": None, "rule": "share", "bounds": None, "estimated": False}
    assert data["settings"] == settings | known
    bounds = {"row": 3.0, "tokens": {"words": None, "digits": 2.5}}
    storage.write_json(manifest | {"rule": "suspect", "bounds": bounds}, f"{folder}/manifest.json")
    assert data_of(folder)["settings"] == settings | known | {"rule": "suspect", "bounds": bounds}
    del settings["target_weights"]  # of an earlier version
    storage.write_json(manifest, f"{folder}/manifest.json")
    assert data_of(folder)["settings"]["target_weights"] == {}


def test_a_sample_is_the_same_for_a_seed_and_bounded(tmp_path):
    write_folder(str(tmp_path), rows=60, shards=60)
    first, again, other = (sample(str(tmp_path), 20, seed)["row_id"].to_pylist() for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 20 == len(set(first))
    assert sample(str(tmp_path), 1000, 0).num_rows == MOST_SHARDS  # a row in each shard here


def test_comparing_with_another_estimator(tmp_path):
    table = write_folder(str(tmp_path / "a"), rows=6)
    write_folder(str(tmp_path / "b"), rows=6)
    data = data_of(tmp_path / "a", compare=str(tmp_path / "b"))
    for name, same in (("other", "adaptation"), ("other_stability", "stability")):
        assert data["columns"][name] == data["columns"][same]
    write_folder(str(tmp_path / "c"), rows=6, seed=1)
    with pytest.raises(UserError, match="other tokens"):
        data_of(tmp_path / "a", compare=str(tmp_path / "c"))
    write_folder(str(tmp_path / "d"), rows=6, pairs=True)
    with pytest.raises(UserError, match="pairs"):
        data_of(tmp_path / "a", compare=str(tmp_path / "d"))
    folder = str(tmp_path / "e")
    write_folder(folder, rows=6)
    storage.write_table(table.slice(0, 2), f"{folder}/data/train-000000000000000.parquet")
    with pytest.raises(UserError, match="lacks row 2"):
        data_of(tmp_path / "a", compare=folder)


def test_groups_are_a_column_or_the_input_file(tmp_path):
    table = write_folder(str(tmp_path), rows=4, shards=1)
    assert {row["group"] for row in data_of(tmp_path)["rows"]} == {"input file 1"}
    with pytest.raises(UserError, match="no column topic"):
        data_of(tmp_path, group_by="topic")
    table = table.append_column("topic", pa.array(["x", "y", "x", None]))
    storage.write_table(table, f"{tmp_path}/data/train-000000000000000.parquet")
    assert [row["group"] for row in data_of(tmp_path, group_by="topic")["rows"]] == ["x", "y", "x", "None"]


def test_text_of_rows_cannot_leave_the_data_element(tmp_path):
    assert json.loads(script_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert not set("<>&") & set(script_json(HOSTILE))
    write_folder(str(tmp_path))
    page = report_page(data_of(tmp_path), HOSTILE)
    assert HOSTILE not in page and page.count("</script>") == 2
    assert "default-src 'none'" in page


def test_job(tmp_path, capsys):
    write_folder(str(tmp_path / "scored"))
    output = tmp_path / "report.html"
    assert job.main([str(tmp_path / "scored"), "--output", str(output)]) == 0
    assert "8 rows" in capsys.readouterr().out
    assert output.read_text().startswith("<!doctype html>")
    assert job.main([str(tmp_path / "nothing"), "--output", str(output)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
