"""`mask --rule suspect`: bounds by what all rows have in excess of the validation rows, whatever the shards."""

import math

import numpy as np
import pyarrow as pa
import pytest

from alphatoken import schema, storage
from alphatoken.errors import UserError
from alphatoken.mask_config import MaskConfig, rule_for
from alphatoken.suspects import FEWEST_TOKENS, LEAST_EXCESS, QUANTILES
from pipelines.mask import run_mask
from tests.scored_folder import CLASSES, END_OF_TURN, MANIFEST, scored_table, write_scored_folder

pytestmark = pytest.mark.usefixtures("local_ray")

NOISY_IDS, NOISY_ROW = range(3, 12), 13  # tokens that are often surprising; every token of this row is


def with_noise(table: pa.Table) -> pa.Table:
    """Losses between 0 and 1, of `NOISY_IDS` mostly 5, of row `NOISY_ROW` 9."""
    random = np.random.default_rng(1)
    rows = table.to_pylist()
    for row in rows:
        for place, inside in enumerate(row["response_mask"]):
            noisy = row["input_ids"][place] in NOISY_IDS and random.random() < 0.8
            loss = 9.0 if row["row_id"] == NOISY_ROW else 5.0 if noisy else random.random()
            row["logprobs"][place] = -loss if inside else 0.0
    return pa.Table.from_pylist(rows, schema=schema.SCORED)


def profile(random: np.random.Generator) -> dict:
    """Of 400 words and 40 ends of turn with losses between 0 and 1; newlines do not occur."""
    classes = {}
    for name, number in (("word", 400), ("end-of-turn", 40)):
        losses = random.random(number)
        bounds = np.quantile(losses, QUANTILES)
        above = [int((losses > bound).sum()) for bound in bounds]
        classes[name] = {"tokens": number, "bounds": bounds.tolist(), "above": above}
    return {"rows": 24, "classes": classes, "row": 2.5}


def write_noisy(folder: str, rows_per_shard: tuple[int, ...], found: dict | None) -> pa.Table:
    write_scored_folder(folder, (1,))
    storage.remove_tree(storage.join(folder, "data"))
    table = with_noise(scored_table(np.random.default_rng(0), 0, sum(rows_per_shard)))
    first = 0
    for number in rows_per_shard:
        name = f"train-{first:015d}.parquet"
        storage.write_table(table.slice(first, number), storage.join(folder, "data", name))
        first += number
    manifest = MANIFEST | ({} if found is None else {"loss_profile": found})
    storage.write_json(manifest, storage.join(folder, "manifest.json"))
    return table


def bounds_by_definition(table: pa.Table, found: dict) -> dict[str, float]:
    losses: dict[str, list[float]] = {name: [] for name in CLASSES}
    for row in table.to_pylist():
        for token, inside, logprob in zip(row["input_ids"], row["response_mask"], row["logprobs"], strict=True):
            if inside:
                losses["end-of-turn" if token == END_OF_TURN else "word"].append(-logprob)
    bounds = dict.fromkeys(CLASSES, math.inf)
    for name, known in found["classes"].items():
        if min(known["tokens"], len(losses[name])) < FEWEST_TOKENS:
            continue
        for bound, above in reversed(list(zip(known["bounds"], known["above"], strict=True))):
            share = sum(loss > bound for loss in losses[name]) / len(losses[name])
            if share * (1 - LEAST_EXCESS) >= (above + 1 + math.sqrt(above + 1)) / known["tokens"]:
                bounds[name] = bound
    return bounds


def kept_by_definition(row: dict, bounds: dict[str, float], any_value: bool, weight: float) -> list[bool]:
    """Of the row's response tokens; empty for a row that is left out."""
    kept, losses = [], []
    for place, inside in enumerate(row["response_mask"]):
        if not inside:
            continue
        losses.append(-row["logprobs"][place])
        value = np.float32(row["adaptation"][place]) + np.float32(weight) * np.float32(row["stability"][place])
        bound = bounds["end-of-turn" if row["input_ids"][place] == END_OF_TURN else "word"]
        kept.append(not (losses[-1] > bound and (any_value or value < 0)))
    return [] if np.mean(losses) > 2.5 or not any(kept) else kept


def masked(folder: str) -> dict[int, list[bool]]:
    found = {}
    for uri in storage.list_shards(folder):
        for row in storage.read_table(uri).to_pylist():
            pairs = zip(row["labels"], row["response_mask"], strict=True)
            found[row["row_id"]] = [label >= 0 for label, inside in pairs if inside]
    return found


@pytest.mark.parametrize("rule", ["auto", "surprising"])
def test_masks_equal_the_definition(tmp_path, rule: str, caplog) -> None:
    known = profile(np.random.default_rng(2))
    table = write_noisy(str(tmp_path / "scored"), (20, 1, 29), known)
    output = str(tmp_path / "masked")
    manifest = run_mask(MaskConfig(input=str(tmp_path / "scored"), output=output, rule=rule, stability_weight=0.5))
    bounds = bounds_by_definition(table, known)
    assert np.isfinite(bounds["word"]) and not np.isfinite(bounds["end-of-turn"])
    expected = {
        row["row_id"]: kept
        for row in table.to_pylist()
        if (kept := kept_by_definition(row, bounds, rule == "surprising", 0.5))
    }
    assert masked(output) == expected
    assert manifest["rule"] == ("suspect" if rule == "auto" else rule)
    assert manifest["bounds"] == {"row": 2.5, "tokens": {"word": bounds["word"], "newline": None, "end-of-turn": None}}
    counts = manifest["counts"]
    assert counts["rows_in"] == 50 and counts["rows_out"] == len(expected) < 50
    assert counts["rows_in"] == counts["rows_out"] + counts["rows_quarantined"] + counts["rows_dropped_sequences"]
    assert 0 < counts["kept_tokens"] == sum(map(sum, expected.values())) < counts["response_tokens"]
    tokens = {row["row_id"]: sum(row["response_mask"]) for row in table.to_pylist()}
    assert counts["response_tokens"] == sum(tokens.values())
    assert counts["dropped_row_tokens"] == sum(tokens[row_id] for row_id in tokens.keys() - expected.keys()) > 0
    [reason] = [
        row["reason"]
        for name in storage.list_names(storage.join(output, "quarantine"))
        for row in storage.read_table(storage.join(output, "quarantine", name)).to_pylist()
        if row["row_id"] == NOISY_ROW
    ]
    assert reason.startswith("suspect row")
    card = storage.read_bytes(f"{output}/README.md").decode()
    assert "Dropped are suspects" in card and ("value is negative" in card) == (rule == "auto") and "frozen" not in card
    assert "frozen" not in caplog.text and "validation rows" not in caplog.text


def test_shards_do_not_matter_and_bounds_do_not_bind_protected_classes(tmp_path) -> None:
    known = profile(np.random.default_rng(2))
    found = []
    for number, shards in enumerate([(50,), (3, 17, 30)]):
        source, output = str(tmp_path / f"scored{number}"), str(tmp_path / f"masked{number}")
        write_noisy(source, shards, known)
        free = run_mask(MaskConfig(input=source, output=output, rule="suspect"))
        found.append(masked(output))
    assert found[0] == found[1] and not all(map(all, found[0].values()))
    protecting = str(tmp_path / "protected")
    manifest = run_mask(MaskConfig(input=source, output=protecting, rule="suspect", protect=["word"]))
    assert all(map(all, masked(protecting).values())) and NOISY_ROW not in masked(protecting)
    assert manifest["bounds"] == free["bounds"] and free["bounds"]["tokens"]["word"]  # of a report without protection


def test_few_validation_rows_are_told(tmp_path, caplog) -> None:
    write_noisy(str(tmp_path / "scored"), (10,), profile(np.random.default_rng(2)) | {"rows": 11})
    run_mask(MaskConfig(input=str(tmp_path / "scored"), output=str(tmp_path / "masked")))
    assert "only 11 validation rows" in caplog.text


def test_the_rule_that_suits_a_folder() -> None:
    known = {"loss_profile": {"rows": 24, "classes": {}, "row": None}}

    def config(**given) -> MaskConfig:
        return MaskConfig(input="i", output="o", **given)

    assert rule_for(config(), known) == "suspect" and rule_for(config(), {}) == "share"
    assert rule_for(config(), known | {"pairs": True}) == "share"
    assert rule_for(config(preset="paper"), known) == rule_for(config(keep_fraction=0.7), known) == "share"
    assert rule_for(config(rule="share"), known) == "share"
    with pytest.raises(UserError, match="score again with --validation"):
        rule_for(config(rule="suspect"), {})
    with pytest.raises(UserError, match="preference pairs"):
        rule_for(config(rule="surprising"), known | {"pairs": True})
    with pytest.raises(ValueError, match="--scope is a setting of --rule share, not of suspect"):
        config(rule="suspect", scope="dataset")
    with pytest.raises(ValueError, match="--preset paper is for --rule share, not for suspect"):
        config(rule="suspect", preset="paper", scope="dataset")
    with pytest.raises(ValueError, match="--keep-fraction is a setting of --rule share, not of suspect"):
        config(rule="suspect", preset="paper", keep_fraction=0.7)
    assert config(rule="suspect", stability_weight=0.0, weights=True).rule == "suspect"


@pytest.mark.parametrize("given", [{}, {"keep_fraction": 0.8}, {"preset": "paper"}, {"rule": "surprising"}])
def test_a_manifest_repeats_the_rule(given) -> None:
    """It has every setting, those of other rules too."""
    known = {"loss_profile": {"rows": 24, "classes": {}, "row": None}}
    first = MaskConfig(input="i", output="o", **given)
    again = MaskConfig(**first.model_dump() | {"rule": rule_for(first, known)})
    assert rule_for(again, known) == rule_for(first, known) and again.keep_fraction == first.keep_fraction
