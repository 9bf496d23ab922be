"""`run_rounds` with real Ray workers and actors, on a tiny model."""

import json
import random
import string
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from alphatoken import storage
from alphatoken.baselines import forward_losses
from alphatoken.batching import make_batch
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.losses import dpo_omega
from alphatoken.model import load_model
from alphatoken.rounds_config import RoundsConfig
from alphatoken.schedule import Window
from alphatoken.suspects import Bounds, TokenLosses, token_losses, validation_losses
from alphatoken.token_classes import class_of_ids
from alphatoken.tokenizer import load_tokenizer
from pipelines.dry_run import dry_run
from pipelines.live_values import validation_batches
from pipelines.rounds import make_schedule, run_rounds, warn_of_nothing
from pipelines.train import read_metrics
from tests.rounds_runs import WORDS, config_of, make_inputs, use_one_thread, weights_at, windows_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return make_inputs(tmp_path_factory.mktemp("rounds"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    use_one_thread(monkeypatch)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"max_steps": 12}, "all 12 steps train on every token, since the first 12 do"),
        ({"max_steps": 13}, ""),
        ({"max_steps": 12, "plain_steps": 12}, ""),
        ({"rule": "none"}, "with --rule none"),
    ],
)
def test_a_run_that_values_nothing_says_so(inputs, tmp_path, caplog, changes, said):
    config = RoundsConfig(**inputs, output=str(tmp_path / "out"), **{"max_steps": 40} | changes)
    warn_of_nothing(config, make_schedule(SimpleNamespace(config=config, plan=SimpleNamespace(num_rows=30))))
    assert said in caplog.text and (said or not caplog.text)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.full), True])
def test_two_actors(local_ray, tmp_path, inputs, overlap):
    oldest = 5 if overlap else 2
    config = config_of(inputs, tmp_path / "out", overlap=overlap, num_actors=2, max_staleness=oldest)
    manifest = run_rounds(config)
    rounds = manifest["rounds"]
    assert manifest["counts"]["steps"] == 10 and rounds["windows"] == 3
    assert rounds["oldest_values"] == oldest and rounds["rows_quarantined"] == 0
    assert 0.8 <= rounds["kept_fraction"] < 0.95
    lines = [line for line in read_metrics(f"{config.output}/metrics.jsonl") if "loss" in line]
    ages = [line.get("values_age") for line in lines]
    start = [None, None, 1, 2, 3, 3, 4, 5, 3, 4] if overlap else [None, None, 0, 1, 2, 0, 1, 2, 0, 1]
    assert ages == start
    for summary, table in windows_of(config.output):
        assert set(table["weights_step"].to_pylist()) == {summary["weights_step"]}
        assert max(table["age"].to_pylist()) == summary["oldest_values"] <= oldest
        kept = sum(label >= 0 for labels in table["labels"].to_pylist() for label in labels)
        assert kept == summary["counts"]["kept_tokens"]
    load_model(f"{config.output}/model")
    assert run_rounds(config) == manifest  # finished: nothing is done again
    assert dry_run(config)["state"] == "finished"


@pytest.mark.slow
def test_values_are_those_of_the_weights_at_the_window(local_ray, tmp_path, inputs):
    """The first window's values, from the checkpoint that plain steps led to, by the library alone."""
    shared = {"preconditioner": "none", "optimizer": "sgd", "plain_steps": 2, "dtype": "float32", "save_steps": 2}
    config = config_of(inputs, tmp_path / "out", **shared, max_steps=4, refresh_every=2)
    run_rounds(config)
    scoring = load_model(weights_at(config.output, 2), "float32")
    shards = storage.list_shards(f"{config.output}/encoded")
    encoded = pa.concat_tables(map(storage.read_table, shards)).to_pylist()
    validation = validation_batches(config, torch.device("cpu"))
    direction = mean_gradient(scoring, validation, GradientOptions("all-linear")).tensors
    estimator = Exact(scoring, "all-linear", direction, method="forward")
    ((_, table),) = windows_of(config.output)
    assert table.num_rows == 8
    for row in table.to_pylist():
        source = encoded[row["row_index"]]
        assert source["input_ids"] == row["input_ids"]
        found = estimator(make_batch([source["input_ids"]], [source["response_mask"]])).adaptation
        stored = torch.tensor(row["adaptation"])[torch.tensor(row["response_mask"])]
        assert (stored - found).abs().max() < 1e-2 * found.abs().max()


def write_easy_rows(path: Path, inputs: dict) -> str:
    """Validation rows, most of them of letters that the random model expects: words then surprise it more."""
    scoring, tokenizer = load_model(inputs["model"], "float32"), load_tokenizer(inputs["model"])
    with torch.no_grad():
        logits = scoring.model(input_ids=torch.tensor([tokenizer(" ".join(WORDS))["input_ids"]])).logits[0]
    likely = logits.log_softmax(-1).mean(0)
    letters = sorted(string.ascii_letters, key=lambda letter: -likely[tokenizer(letter)["input_ids"][-1]])
    rows = [json.loads(line) for line in Path(inputs["validation"][0]).read_text().splitlines()]
    for row in rows[1:]:
        row["completion"] = " " + 10 * "".join(letters[:3])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["suspect", pytest.param("surprising", marks=pytest.mark.full)])
def test_suspect_tokens_and_rows_are_left_out(local_ray, tmp_path, inputs, rule, caplog):
    """The first window's masks are those of the library at the weights that plain steps led to."""
    shared = {"preconditioner": "none", "optimizer": "sgd", "plain_steps": 2, "dtype": "float32", "save_steps": 2}
    own = inputs | {"validation": [write_easy_rows(tmp_path / "validation.jsonl", inputs)]}
    config = config_of(own, tmp_path / "out", **shared, rule=rule, max_steps=4, refresh_every=2)
    manifest = run_rounds(config)
    assert "only 5 validation rows: in trial runs" in caplog.text
    scoring = load_model(weights_at(config.output, 2), "float32")
    validation = validation_batches(config, torch.device("cpu"))
    class_of = torch.from_numpy(class_of_ids(config.model))
    known = validation_losses(scoring, validation, class_of)
    direction = mean_gradient(scoring, validation, GradientOptions("all-linear")).tensors
    estimator = Exact(scoring, "all-linear", direction, method="forward")
    ((summary, table),) = windows_of(config.output)
    assert summary["counts"]["rows_in"] == 8
    dropped = summary["counts"]["rows_dropped_sequences"]
    assert dropped == manifest["rounds"]["rows_dropped_sequences"] > 0 and table.num_rows == 8 - dropped
    stays = {row["row_index"]: row for row in table.to_pylist()}
    encoded = storage.read_table(storage.list_shards(f"{config.output}/encoded")[0]).to_pylist()
    rows, _ = make_schedule(SimpleNamespace(config=config, plan=SimpleNamespace(num_rows=30))).rows_of(Window(2, 4, 2))
    batches = [make_batch([encoded[i]["input_ids"]], [encoded[i]["response_mask"]]) for i in rows.tolist()]
    found = [estimator(batch) for batch in batches]
    judged = [token_losses(batch, -values.logprobs, class_of) for batch, values in zip(batches, found, strict=True)]
    bounds = Bounds.of(known, TokenLosses.joined(judged))
    for index, values, losses in zip(rows.tolist(), found, judged, strict=True):
        keep = bounds.keep(losses, values.adaptation.numpy() if rule == "suspect" else None)
        if not keep.any():
            assert index not in stays
            continue
        labels = np.array(stays[index]["labels"])[np.array(encoded[index]["response_mask"])]
        assert ((labels >= 0) == keep).all()


@pytest.mark.full
@pytest.mark.slow
def test_lora(local_ray, tmp_path, inputs):
    config = config_of(inputs, tmp_path / "out", lora_rank=2, preconditioner="none", max_steps=5)
    manifest = run_rounds(config)
    assert manifest["rounds"]["windows"] == 1
    load_model(f"{config.output}/model")


def test_what_does_not_fit_is_refused():
    base = {"data": ["d"], "model": "m", "output": "o", "validation": ["v"], "rule": "share"}
    for settings, match in (
        ({"max_staleness": 10}, "values get up to 11 steps old"),
        ({"max_staleness": 20, "overlap": True}, "values get up to 23 steps old"),
        ({"validation": []}, "rounds need --validation"),
        ({"plain_steps": 0}, "needs --plain-steps 1 or more"),
        ({"lora_rank": 2}, "with --lora-rank give --preconditioner none"),
        ({"optimizer": "sgd"}, "needs an AdamW optimizer"),
        ({"generate": 4}, "needs --objective dpo"),
        ({"generate": 1, "objective": "dpo"}, "a pair needs two responses"),
        ({"generate": 2, "objective": "dpo", "verifier": "numbr"}, "give number, exact, math, or a function"),
        ({"verifier": "math"}, "--verifier needs --generate"),
        ({"temperature": 0.5}, "--temperature needs --generate"),
        ({"objective": "dpo", "rule": "none", "stop": ["x"]}, "--stop needs --generate"),
        ({"max_new_tokens": 5}, "--max-new-tokens needs --generate"),
        ({"validation_objective": "dpo"}, "is for `alphatoken score`"),
        ({"in_run": True}, "is an option of `alphatoken train`"),
        ({"rule": "surprising", "drop_sequences": 0.2}, "--drop-sequences goes by mean value, and --rule surprising"),
        ({"rule": "suspect", "keep_fraction": 0.7}, "--keep-fraction is a setting of --rule share, not of suspect"),
        ({"rule": "surprising", "scope": "sequence"}, "--scope is a setting of --rule share, not of surprising"),
    ):
        with pytest.raises(ValueError, match=match):
            RoundsConfig(**(base | settings))


@pytest.mark.full
@pytest.mark.slow
def test_without_a_rule_every_token_is_trained_on(local_ray, tmp_path, inputs, caplog):
    config = config_of(inputs, tmp_path / "out", rule="none", max_steps=4)
    manifest = run_rounds(config)
    assert "every token is trained on" in caplog.text and "validation rows" not in caplog.text
    assert manifest["counts"]["steps"] == 4 and manifest["rounds"]["windows"] == 0


def test_the_default_rule():
    base = {"data": ["d"], "model": "m", "output": "o", "validation": ["v"]}
    assert RoundsConfig(**base).rule == "suspect"
    assert RoundsConfig(**base, objective="dpo").rule == "none"
    for settings in ({"keep_fraction": 0.7}, {"scope": "sequence"}, {"preset": "paper"}):
        assert RoundsConfig(**base, **settings).rule == "share"
    assert RoundsConfig(**base, preset="paper", rule="surprising").rule == "surprising"
    again = RoundsConfig(**base).model_dump()  # as a manifest has it
    assert RoundsConfig(**again).rule == "suspect"


def test_the_schedule_is_the_trainer_s(inputs, tmp_path):
    config = config_of(inputs, tmp_path, num_workers=2, gradient_accumulation=2, max_steps=None, epochs=2)
    found = make_schedule(SimpleNamespace(config=config, plan=SimpleNamespace(num_rows=30)))
    assert (found.rows_per_forward, found.steps_per_epoch, found.total_steps) == (8, 2, 4)


def write_pairs(path: Path, count: int) -> str:
    draw = random.Random(2)
    rows = []
    for number in range(count):
        prompt, chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) for _ in range(3))
        rows.append({"id": f"p{number}", "prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_dpo(local_ray, tmp_path, inputs):
    """Values of pairs have DPO's sign and weight: the library's own, at the weights of the window."""
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    shared = {"objective": "dpo", "preconditioner": "none", "optimizer": "sgd", "per_device_batch_size": 2}
    shared |= {"save_steps": 2}
    config = config_of(inputs | {"data": [data]}, tmp_path / "out", **shared, max_steps=4, refresh_every=2)
    manifest = run_rounds(config)
    assert manifest["rounds"]["windows"] == 1 and manifest["rounds"]["kept_fraction"] < 1
    ((_, table),) = windows_of(config.output)
    for name in ("chosen", "rejected"):
        kept = [sum(mask) for mask in table[f"{name}_mask"].to_pylist()]
        assert all(kept) and sum(kept) < sum(map(len, table[f"{name}_ids"].to_pylist()))
    policy, reference = (load_model(name, "float32") for name in (weights_at(config.output, 2), config.model))
    direction = mean_gradient(
        policy, validation_batches(config, torch.device("cpu")), GradientOptions("all-linear")
    ).tensors
    estimator = Exact(policy, "all-linear", direction, method="forward")
    for row in table.to_pylist():
        ratios, values = [], []
        for name in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{name}_ids"]
            batch = make_batch([ids], [[i >= len(row["prompt_ids"]) for i in range(len(ids))]])
            found = estimator(batch)
            ratios.append((found.logprobs + forward_losses(reference, batch).losses).sum())
            values.append(found.adaptation)
        omega = dpo_omega(*ratios, config.beta)
        for name, sign, expected in zip(("chosen", "rejected"), (1, -1), values, strict=True):
            expected = sign * omega * expected
            assert (torch.tensor(row[f"{name}_adaptation"]) - expected).abs().max() < 1e-2 * expected.abs().max()


def generating(inputs: dict, folder: Path, verifier: str, **changes) -> RoundsConfig:
    """A run on pairs of its own, from a prompt for each of WORDS."""
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{word} is", "answer": word}) for word in WORDS]
    prompts.write_text("\n".join(lines) + "\n")
    settings = {"stop": ["e", " "], "max_new_tokens": 24, "max_steps": 6, "plain_steps": 3, "per_device_batch_size": 2}
    return config_of(
        inputs | {"data": [str(prompts)]}, folder / "out", objective="dpo", generate=3,
        verifier=f"tests.own_verifier:{verifier}", **(settings | changes),
    )  # fmt: skip


@pytest.mark.full
@pytest.mark.slow
def test_dpo_on_pairs_generated_for_each_window(local_ray, tmp_path, inputs):
    """Plain windows too: from the first step on, pairs are those of the weights of the moment."""
    config = generating(inputs, tmp_path, "shortest")
    manifest = run_rounds(config)
    windows = windows_of(config.output)
    assert manifest["rounds"]["windows"] == len(windows) == 2
    assert [summary["weights_step"] for summary, _ in windows] == [0, 3]
    plain, valued = (table for _, table in windows)
    assert plain.num_rows and all(all(mask) for mask in plain["chosen_mask"].to_pylist())
    assert "chosen_adaptation" in valued.column_names and "chosen_adaptation" not in plain.column_names


@pytest.mark.slow
def test_prompts_without_a_pair_are_counted_and_put_aside(local_ray, tmp_path, inputs):
    config = generating(inputs, tmp_path, "shortest_but_of_apples", max_steps=7, plain_steps=4, refresh_every=4)
    rounds = run_rounds(config)["rounds"]
    assert rounds["rows_in"] == len(WORDS) == rounds["rows_out"] + rounds["rows_quarantined"]
    tables = [storage.read_table(str(path)) for path in Path(config.output).rglob("windows/*/quarantine-*")]
    aside = {row["position"]: row for table in tables for row in table.to_pylist()}
    assert len(aside) == rounds["rows_quarantined"] == sum(rounds["quarantine_reasons"].values())
    found = aside[WORDS.index("apples")]
    assert found["stage"] == "generate"
    assert found["reason"] in ("all responses have the same score (0)", "fewer than two different responses")
    assert found["source"] == f"{config.output}/encoded" and found["id"] == "prompts.jsonl:5"
    for summary, rows in windows_of(config.output):
        counts = summary["counts"]
        assert counts["rows_out"] == rows.num_rows == counts["rows_in"] - counts["rows_quarantined"]


@pytest.mark.slow
def test_a_run_without_any_pair_fails(local_ray, tmp_path, inputs, caplog):
    config = generating(inputs, tmp_path, "undecided", preconditioner="none")
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError, match=r"no prompt gave a pair in any step.* \d+ x all responses have the same"):
            run_rounds(config)
    assert not storage.exists(f"{config.output}/manifest.json")
    assert "steps 1 to 3 train on nothing, since none of their 6 prompts gave a pair: " in caplog.text
