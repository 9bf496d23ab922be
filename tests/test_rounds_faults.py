"""`run_rounds` with its driver, an actor or the trainer killed: the same steps, losses and masks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from alphatoken import storage
from pipelines.poison import DIED
from pipelines.rounds import run_rounds
from pipelines.window_files import window_folder
from tests.faults.deadly import DEADLY_SAMPLE, DeadlyWindowScorer
from tests.rounds_runs import WORDS, config_of, losses_of, make_inputs, use_one_thread, windows_of
from tests.test_train_pipeline import wait_until_gone, workers_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return make_inputs(tmp_path_factory.mktemp("rounds"))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    use_one_thread(monkeypatch)


DRIVER = """
import json, sys, pipelines.train, pipelines.rounds
from alphatoken.rounds_config import RoundsConfig
pipelines.train.torch_threads = pipelines.rounds.torch_threads = lambda *_: 1
pipelines.rounds.run_rounds(RoundsConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_driver_and_a_killed_actor_change_nothing(local_ray, tmp_path, inputs):
    undisturbed = config_of(inputs, tmp_path / "plain", overlap=True)
    run_rounds(undisturbed)

    config = undisturbed.model_copy(update={"output": str(tmp_path / "out")})
    root = str(Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": root}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(config.model_dump(mode="json"))],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = Path(window_folder(config.output, 5), "window.json")
    while not second.exists():  # the second window is valued: the trainer is at step 5 or later, or about to be
        assert driver.poll() is None
        time.sleep(0.02)
    others = workers_of(psutil.Process(driver.pid), "RayTrainWorker", "TrainController", "WindowScorer")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until_gone(others)
    assert not storage.exists(f"{config.output}/manifest.json")

    killed = []

    def kill_an_actor(line: dict) -> None:
        victims = workers_of(psutil.Process(), "WindowScorer")
        if not killed and victims:
            killed.append(victims[0].pid)
            victims[0].kill()

    manifest = run_rounds(config, kill_an_actor)
    assert killed and manifest["counts"]["steps"] == 10
    assert losses_of(config.output) == pytest.approx(losses_of(undisturbed.output), rel=1e-4)
    for (first, a), (then, b) in zip(windows_of(undisturbed.output), windows_of(config.output), strict=True):
        assert first["weights_step"] == then["weights_step"]
        assert a["labels"].to_pylist() == b["labels"].to_pylist()


@pytest.mark.full
@pytest.mark.slow
def test_a_row_that_kills_the_scoring_actor_is_put_aside(local_ray, tmp_path, inputs):
    config = config_of(inputs, tmp_path / "out", max_steps=8, seed=2)  # the row is in the first window that is valued
    with mock.patch("pipelines.rounds.WindowScorer", DeadlyWindowScorer):
        manifest = run_rounds(config)
    assert manifest["counts"]["steps"] == 8
    tables = {Path(path).name: storage.read_table(str(path)) for path in Path(config.output).rglob("quarantine-*")}
    [aside] = [row for table in tables.values() for row in table.to_pylist()]
    assert aside["row_id"] == DEADLY_SAMPLE and aside["reason"].startswith(DIED)
    for summary, rows in windows_of(config.output):
        assert DEADLY_SAMPLE not in rows["row_id"].to_pylist()
        assert summary["counts"]["rows_in"] == summary["counts"]["rows_out"] + summary["counts"]["rows_quarantined"]


@pytest.mark.full
@pytest.mark.slow
def test_a_prompt_that_kills_the_verifier_is_put_aside(local_ray, tmp_path, inputs):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{word} is", "answer": "boom" if word == "four" else word}) for word in WORDS]
    prompts.write_text("\n".join(lines) + "\n")
    config = config_of(
        inputs | {"data": [str(prompts)]}, tmp_path / "out", objective="dpo", generate=3, rule="none", max_steps=4,
        verifier="tests.own_verifier:deadly", stop=["e", " "], max_new_tokens=24,
    )  # fmt: skip
    rounds = run_rounds(config)["rounds"]
    assert rounds["rows_out"] and rounds["rows_in"] == len(WORDS) == rounds["rows_out"] + rounds["rows_quarantined"]
    assert rounds["quarantine_reasons"][f"{DIED}, 4 times"] == 1


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_trainer(local_ray, tmp_path, inputs):
    undisturbed = config_of(inputs, tmp_path / "plain", max_steps=8)
    run_rounds(undisturbed)
    config = config_of(inputs, tmp_path / "out", max_steps=8)
    killed = []

    def kill_the_trainer(line: dict) -> None:
        if not killed and line["step"] >= 4:
            victim = workers_of(psutil.Process(), "RayTrainWorker")[0]
            killed.append(victim.pid)
            victim.kill()

    run_rounds(config, kill_the_trainer)
    assert killed
    assert losses_of(config.output) == pytest.approx(losses_of(undisturbed.output), rel=1e-4)
