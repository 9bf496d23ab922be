import json

import pyarrow as pa
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
    assert metadata["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    assert "alphatoken" in metadata["tags"]
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


def test_meaning_of_columns_of_a_branch_and_of_a_target():
    assert meaning("rejected_mask") == "rejected response: true where the token is trained on"
    assert meaning("chosen_sample").endswith("-1: the data set's own answer")
    assert meaning("chosen_adaptation.math") == "chosen response: adaptation for the target `math` alone"
    assert meaning("mean_adaptation.math") == "mean adaptation for the target `math` alone"
    for name in ("topic", "chosen_topic", "chosen_", "mask_of_mine"):
        assert meaning(name) == CARRIED_OVER
