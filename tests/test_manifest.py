import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from alphatoken import manifest, schema
from alphatoken.columns import CARRIED_OVER, OF_STAGE, meaning, meaning_in

COUNTS = {"rows_in": 5, "rows_out": 3, "rows_quarantined": 1, "rows_dropped_sequences": 1}
CONFIG = {"input": "runs/a: 'b'", "keep_fraction": 0.8, "protect": ["end-of-turn"], "min_value": None}


def build(**changes):
    arguments = {"stage": "mask", "config": CONFIG, "counts": COUNTS, "fingerprints": {"model": "abc"}, "seconds": 1.5}
    return manifest.build_manifest(**arguments | changes)


def test_counts_must_add_up():
    manifest.check_counts(COUNTS)
    manifest.check_counts({"rows_in": 2, "rows_out": 2, "rows_quarantined": 0})
    with pytest.raises(RuntimeError, match="6 in, 5 accounted for"):
        build(counts=COUNTS | {"rows_in": 6})


def test_manifest_says_what_made_it():
    built = build(extra={"threshold": 0.5})
    assert built["versions"]["pyarrow"] == pa.__version__
    assert built["threshold"] == 0.5 and built["config"] == CONFIG and built["seconds"] == 1.5
    assert json.loads(json.dumps(built)) == built
    build(counts={"prompts": 3})  # stages without rows


def test_fingerprint_ignores_the_order_of_keys():
    assert manifest.fingerprint({"a": 1, "b": 2}) == manifest.fingerprint({"b": 2, "a": 1})
    assert manifest.fingerprint({"a": 1}) != manifest.fingerprint({"a": 2})


@pytest.mark.parametrize("stage", ["score", "mask", "generate"])
def test_card_has_metadata_columns_and_config(stage):
    columns = pa.schema([*schema.SCORED, *schema.MASKED_EXTRA, pa.field("topic", pa.string())])
    scored = {"scored": {"config": {"model": "m"}}} if stage == "mask" else {}
    card = manifest.data_card(stage, build(stage=stage, extra=scored), columns)
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata.keys() == {"tags"} and "alphatoken" in metadata["tags"]
    assert "| `labels` | `list<int32>` |" in body
    assert "| `topic` | `string` | carried over from the input |" in body
    config = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert config == CONFIG
    assert ("frozen" in body) == (stage == "mask")


@pytest.mark.parametrize("stage", ["score", "mask"])
def test_card_of_pairs_speaks_of_pairs(stage):
    columns = pa.schema([*schema.SCORED_PAIRS, *schema.MASKED_PAIRS_EXTRA])
    card = manifest.data_card(stage, build(stage=stage), columns)
    assert "preference pairs" in card and "SFTTrainer" not in card and "input_ids" not in card
    assert ("- dpo" in card) == (stage == "mask")


@pytest.mark.parametrize("stage", OF_STAGE)
def test_every_column_of_every_stage_has_a_meaning(stage):
    assert not [name for name in OF_STAGE[stage] if meaning(name) == CARRIED_OVER]


def test_columns_beside_the_stages_have_a_meaning():
    names = [field.name for field in (*schema.QUARANTINE, *schema.WINDOW_EXTRA)]
    assert not [name for name in names if meaning(name) == CARRIED_OVER]


def test_a_column_of_the_users_is_carried_over_whatever_its_name():
    assert meaning_in("score", "source") == meaning_in("mask", "text") == CARRIED_OVER
    assert meaning_in("score", "adaptation.math") == meaning("adaptation.math") != CARRIED_OVER


@pytest.mark.parametrize("stage", ["score", "mask"])
def test_card_of_a_control_claims_no_target(stage):
    scored = {"config": CONFIG | {"estimator": "loss"}}
    built = build(stage=stage, extra={"scored": scored}) if stage == "mask" else build(stage=stage, **scored)
    card = manifest.data_card(stage, built, pa.schema([*schema.SCORED]))
    assert "those of a control, `loss`" in card and "target task falls" not in card
    assert "| `adaptation` | `list<float>` | what the control `loss` says of the token |" in card


def test_datasets_takes_no_folder_for_another_of_the_same_name(tmp_path):
    """As it does by metadata with `configs`; and nothing but the rows is read."""
    for folder, rows in (("a", 2), ("b", 3), ("a", 4)):
        place = tmp_path / folder / "masked"
        for name, column in (("data/train", "x"), ("quarantine/quarantine", "reason")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({column: list(range(rows))}), place / f"{name}-{0:015d}.parquet")
        pq.write_table(pa.table({"token_id": [1]}), place / "token_classes.parquet")
        (place / "run.json").write_text("{}")
        (place / "README.md").write_text(manifest.data_card("mask", build(), schema.SCORED))
        found = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache"))
        assert {name: (part.num_rows, part.column_names) for name, part in found.items()} == {"train": (rows, ["x"])}


def test_reasons_that_differ_in_numbers_are_one_and_sums_stay():
    reasons = {f"column {n} is bad": n for n in range(1, 6)} | {"no prompt": 4, "too long: 9 tokens": 2}
    found = manifest.most_reasons(reasons, 2)
    assert found == {"column # is bad": 15, "no prompt": 4, manifest.OTHERS: 2}
    assert manifest.most_reasons(reasons, 9)["too long: 9 tokens"] == 2
    assert manifest.most_reasons(found | {"x": 1}, 1) == {"column # is bad": 15, manifest.OTHERS: 7}
    assert manifest.told_reasons(reasons, 1) == "15 x column # is bad; 6 x other reasons"


def test_meaning_of_columns_of_a_branch_and_of_a_target():
    assert meaning("rejected_mask") == "rejected response: true where the token is trained on"
    assert meaning("chosen_sample").endswith("-1: the data set's own answer")
    assert meaning("chosen_adaptation.math") == "chosen response: adaptation for the target `math` alone"
    assert meaning("mean_adaptation.math") == "mean adaptation for the target `math` alone"
    for name in ("topic", "chosen_topic", "chosen_", "mask_of_mine"):
        assert meaning(name) == CARRIED_OVER
