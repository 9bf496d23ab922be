"""`run_train` with --in-run: raw files in, the same step on one worker and on two."""

from pathlib import Path

import pytest

from alphatoken.errors import UserError
from alphatoken.train_config import TrainConfig
from pipelines.train import read_metrics, run_train
from tests import hand_written
from tests.masked_folder import pair_rows, write_masked, write_model
from tests.rounds_runs import write_rows
from tests.test_train_pipeline import ONE_SGD_STEP, difference, load64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("in-run")
    return {
        "model": write_model(folder / "model"),
        "data": [write_rows(folder / "data.jsonl", 8, 0)],
        "validation": [write_rows(folder / "validation.jsonl", 4, 1)],
        "in_run": True,
        "rule": "share",
        "parameters": "last-layers:1",
    }


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors on a shared machine: more threads only wait for one another."""
    monkeypatch.setattr("pipelines.train.torch_threads", lambda *_: 1)


@pytest.mark.slow
def test_workers_change_neither_masks_nor_gradient(local_ray, tmp_path, inputs):
    """8 rows in one step: on one worker in one batch, on two in two batches each."""
    steps, before = [], load64(inputs["model"])
    for workers, batch, accumulation in ((1, 8, 1), (2, 2, 2)):
        config = TrainConfig(
            **inputs, output=str(tmp_path / f"out-{workers}"), num_workers=workers, per_device_batch_size=batch,
            gradient_accumulation=accumulation, **ONE_SGD_STEP,
        )  # fmt: skip
        manifest = run_train(config)
        assert manifest["counts"]["rows"] == 8 and Path(config.output, "encoded", "manifest.json").exists()
        (line,) = [line for line in read_metrics(f"{config.output}/metrics.jsonl") if "loss" in line]
        assert 0.7 < line["kept_fraction"] < 0.95
        steps.append(difference(before, load64(f"{config.output}/model")))
    hand_written.assert_same_gradient(*steps)


@pytest.mark.full
@pytest.mark.slow
def test_dpo_from_a_folder_of_pairs(local_ray, tmp_path, inputs):
    rows = [row | {"ref_chosen_logps": -20.0, "ref_rejected_logps": -20.0} for row in pair_rows(4)]
    pairs = write_masked(tmp_path / "pairs", rows, inputs["model"])
    config = TrainConfig(**(inputs | {"data": [pairs]}), objective="dpo", output=str(tmp_path / "out"), max_steps=2)
    run_train(config)
    lines = read_metrics(f"{config.output}/metrics.jsonl")
    assert "rewards/margins" in lines[0] and lines[0]["kept_fraction"] < 1


def test_bad_inputs_are_refused_before_training(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr("pipelines.train.connect", lambda *_: pytest.fail("training was about to start"))
    right = inputs | {"output": str(tmp_path / "out")}

    def refused(match: str, **changes) -> None:
        with pytest.raises(UserError, match=match):
            run_train(TrainConfig(**(right | changes)))

    refused("no-such", validation=[str(tmp_path / "no-such.jsonl")])
    refused("no-such", data=[str(tmp_path / "no-such.jsonl")])
    refused("last-layers:9: the model has only 2 decoder layers", parameters="last-layers:9")
    refused("nonsense", class_weights={"nonsense": 0})
    refused("no such file; make it with `alphatoken fisher`", fisher=str(tmp_path / "none.safetensors"))
    pairs = write_masked(tmp_path / "pairs", pair_rows(4), inputs["model"])
    refused("has no reference log-probabilities", data=[pairs], objective="dpo")


def test_settings_that_do_not_fit_together():
    base = {"data": ["d"], "model": "m", "output": "o"}
    for settings, match in (
        ({"in_run": True}, "--in-run needs --validation"),
        ({"validation": ["v"]}, "--validation needs --in-run"),
        ({"in_run": True, "validation": ["v"], "lora_rank": 2}, "use `alphatoken rounds`"),
        ({"in_run": True, "validation": ["v"], "gradient_checkpointing": True}, "reads activations"),
        ({"in_run": True, "validation": ["v"], "parameters": "all"}, "scores linear weights"),
        ({"data": ["a", "b"]}, "takes one folder"),
        ({"in_run": True, "validation": ["v"], "preconditioner": "adam", "optimizer": "sgd"}, "needs an AdamW optim"),
        ({"in_run": True, "validation": ["v"], "rule": "none"}, "train without --in-run"),
        ({"in_run": True, "validation": ["v"], "objective": "dpo", "rule": "suspect"}, "is for --objective sft"),
        ({"in_run": True, "validation": ["v"], "rule": "surprising", "fisher": "f"}, "--fisher would not matter"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(**(base | settings))
    paper = TrainConfig(**base, in_run=True, validation=["v"], preset="paper", keep_fraction=0.7)
    assert (paper.keep_fraction, paper.stability_weight, paper.scored_parameters) == (0.7, 1.5, "last-layers:3")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("suspect", 12, 12)),
        ({"rule": "suspect", "plain_steps": 0}, ("suspect", 0, 12)),
        ({"keep_fraction": 0.5}, ("share", 0, 10)),
        ({"rule": "share"}, ("share", 0, 10)),
        ({"preset": "paper"}, ("share", 0, 10)),
        ({"objective": "dpo"}, ("share", 0, 10)),
    ],
)
def test_in_run_sft_leaves_out_suspects_unless_told_otherwise(given, expected):
    config = TrainConfig(data=["d"], model="m", output="o", in_run=True, validation=["v"], **given)
    assert (config.rule, config.plain_steps, config.refresh_every) == expected
