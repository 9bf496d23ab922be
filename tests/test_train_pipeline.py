"""`run_train` on Ray Train workers: gradients over several of them, kills and resumes, LoRA, what is refused."""

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.model import load_model
from alphatoken.train_config import TrainConfig
from pipelines.dry_run import dry_run
from pipelines.lora_targets import check_lora_targets
from pipelines.train import read_metrics, run_train
from pipelines.train_worker import _lora, build_trainer
from tests import hand_written
from tests.masked_folder import pair_rows, sft_rows, write_masked, write_model
from tests.tiny_tokenizers import CHATML, byte_level

BETA = 0.3
ONE_SGD_STEP = {
    "dtype": "float64", "optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant", "max_grad_norm": 0.0,
    "max_steps": 1,
}  # fmt: skip
LONG = {"dtype": "float64", "learning_rate": 1e-3, "epochs": 2, "save_steps": 4, "per_device_batch_size": 1}
WAIT = 120  # seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def masked(tmp_path_factory, model) -> str:
    return write_masked(tmp_path_factory.mktemp("data") / "masked", sft_rows(26), model)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny tensors on a shared machine: more threads only wait for one another."""
    monkeypatch.setattr("pipelines.train.torch_threads", lambda *_: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load64(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def difference(before, after) -> list[torch.Tensor]:
    return [old.detach() - new.detach() for old, new in zip(before.parameters(), after.parameters(), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_sft_gradient_over_workers(local_ray, tmp_path, model, workers):
    """7 rows: with two workers, one of them has a row less, and nothing counts twice."""
    rows = sft_rows(7, seed=3)
    data = write_masked(tmp_path / "masked", rows, model)
    config = TrainConfig(
        data=data, model=model, output=str(tmp_path / "out"), num_workers=workers, per_device_batch_size=1,
        gradient_accumulation=8 // workers, **ONE_SGD_STEP,
    )  # fmt: skip
    lines = []
    manifest = run_train(config, lines.append)
    before = load64(model)
    expected = hand_written.gradient(copy.deepcopy(before), lambda m: hand_written.sft(m, rows))
    hand_written.assert_same_gradient(difference(before, load64(f"{config.output}/model")), expected)

    assert manifest["counts"] | {"steps": 1, "rows": 7, "skipped_batches": 0} == manifest["counts"]
    assert lines == read_metrics(f"{config.output}/metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(hand_written.sft(before, rows).item(), rel=1e-6)
    load_model(f"{config.output}/model")
    assert run_train(config) == manifest  # finished: nothing is done again
    assert dry_run(config)["state"] == "finished"
    with pytest.raises(UserError, match="holds the output of a different run.*learning_rate: 1.0 -> 0.5"):
        run_train(config.model_copy(update={"learning_rate": 0.5}))


@pytest.mark.slow
def test_dpo_gradient_over_workers(local_ray, tmp_path, model):
    """3 pairs on 2 workers, so one gets a filler; the reference's log-probabilities are stored."""
    reference = load64(write_model(tmp_path / "reference", seed=1))
    rows = pair_rows(3, seed=2)
    for row in rows:
        with torch.no_grad():
            found = hand_written.pair_sums(reference, row)
        row |= {f"ref_{side}_logps": found[side][0].item() for side in found}
    data = write_masked(tmp_path / "masked", rows, model, shards=1)
    config = TrainConfig(
        objective="dpo", data=data, model=model, output=str(tmp_path / "out"), num_workers=2, beta=BETA,
        per_device_batch_size=1, gradient_accumulation=2, **ONE_SGD_STEP,
    )  # fmt: skip
    assert run_train(config)["stored_reference"]
    before = load64(model)
    expected = hand_written.dpo_gradient(copy.deepcopy(before), reference, rows, BETA, "loss")
    hand_written.assert_same_gradient(difference(before, load64(f"{config.output}/model")), expected)
    loss = hand_written.dpo_loss(before, reference, rows, BETA, "loss")
    assert read_metrics(f"{config.output}/metrics.jsonl")[0]["loss"] == pytest.approx(loss, rel=1e-5)


def uninterrupted(config: TrainConfig, folder: Path):
    """The same run in this process: one worker with the batch of all. Returns the trainer."""
    whole = {"per_device_batch_size": config.per_device_batch_size * config.num_workers, "num_workers": 1}
    shards = storage.list_shards(config.folder)
    settings = {
        "shards": shards, "columns": storage.read_schema(shards[0]).names, "stored_reference": False,
        "evaluation_shards": [],
    }  # fmt: skip
    trainer = build_trainer(config.model_copy(update=whole | {"save_steps": 10**6}), settings, str(folder))
    trainer.train()
    return trainer


def assert_as_if_nothing_happened(config: TrainConfig, manifest: dict, trainer) -> None:
    """Every step is there once, with the loss that it has without the kill: so the rows were those, each once."""
    found = [line for line in read_metrics(f"{config.output}/metrics.jsonl") if "loss" in line]
    expected = [line for line in trainer.state.log_history if "loss" in line]
    assert manifest["counts"]["steps"] == trainer.state.global_step == len(found)
    assert [line["step"] for line in found] == list(range(1, len(expected) + 1))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    for new in difference(trainer.model, load64(f"{config.output}/model")):
        assert new.abs().max() < 1e-6


def wait_for_checkpoint(output: str) -> None:
    """Until Ray Train has listed one."""
    snapshot = Path(output, "checkpoints", "run", "checkpoint_manager_snapshot.json")
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if snapshot.exists() and "checkpoint_" in snapshot.read_text():
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def wait_until_gone(processes: list) -> None:
    """A process that nobody has collected yet counts as gone."""
    deadline = time.monotonic() + WAIT
    while alive := [process for process in processes if process.is_running() and process.status() != "zombie"]:
        assert time.monotonic() < deadline, f"Ray outlived its driver: {alive}"
        time.sleep(0.1)


def workers_of(process, *titles: str) -> list:
    """Ray's processes below one of ours whose title has one of `titles`."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if any(title in " ".join(child.cmdline()[:1]) for title in titles):
                found.append(child)
    return found


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_worker(local_ray, tmp_path, model, masked):
    config = TrainConfig(data=masked, model=model, output=str(tmp_path / "out"), num_workers=2, **LONG)
    killed = []

    def kill_one(line: dict) -> None:
        checkpoints = list(Path(config.output, "checkpoints", "run").glob("checkpoint_2*"))
        if not killed and checkpoints and line["step"] >= 5:
            victim = workers_of(psutil.Process(), "RayTrainWorker")[0]
            killed.append((line["step"], victim.pid))
            victim.kill()

    manifest = run_train(config, kill_one)
    assert killed, "the run ended before a worker was killed"
    assert_as_if_nothing_happened(config, manifest, uninterrupted(config, tmp_path / "plain"))


DRIVER = """
import json, sys, pipelines.train
pipelines.train.torch_threads = lambda *_: 1
pipelines.train.run_train(pipelines.train.TrainConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_driver(local_ray, tmp_path, model, masked):
    config = TrainConfig(data=masked, model=model, output=str(tmp_path / "out"), seed=3, **LONG)
    root = str(Path(__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": root}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(config.model_dump(mode="json"))],
        env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_checkpoint(config.output)
        others = workers_of(psutil.Process(driver.pid), "RayTrainWorker", "TrainController")
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_until_gone(others)
    assert not storage.exists(f"{config.output}/manifest.json")

    with pytest.raises(UserError, match="cut off; --resume goes on with it"):
        run_train(config.model_copy(update={"resume": False}))
    steps = []
    manifest = run_train(config, lambda line: steps.append(line["step"]))
    assert_as_if_nothing_happened(config, manifest, uninterrupted(config, tmp_path / "plain"))


@pytest.mark.slow
def test_lora_with_evaluation_and_early_stopping(local_ray, tmp_path, model, masked):
    """The loss rises at once at this rate, so the run stops early and returns its first checkpoint."""
    held_out = tmp_path / "held-out.jsonl"
    texts = [("What is two plus two?", "The answer is four."), ("Hello there", "how are you today?")]
    held_out.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in texts))
    config = TrainConfig(
        data=masked, model=model, output=str(tmp_path / "out"), lora_rank=2, learning_rate=0.5, schedule="constant",
        evaluation=[str(held_out)], eval_steps=1, early_stopping=2, epochs=10, weights=False,
    )  # fmt: skip
    manifest = run_train(config)
    lines = read_metrics(f"{config.output}/metrics.jsonl")
    held = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(held, key=held.get)
    assert manifest["counts"]["steps"] == best + 2 < 70
    assert json.loads(Path(manifest["checkpoint"], "trainer_state.json").read_text())["global_step"] == best

    from peft import PeftModel

    merged = load_model(f"{config.output}/model").model
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, f"{config.output}/adapter")
    ids = torch.tensor([[20, 30, 40, 50]])
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def refused(match: str, **settings) -> None:
    with pytest.raises(UserError, match=match) as caught:
        run_train(TrainConfig(**settings))
    assert "\n" not in str(caught.value)


def test_bad_inputs_are_refused_before_training(tmp_path, model, masked, monkeypatch):
    monkeypatch.setattr("pipelines.train.connect", lambda: pytest.fail("training was about to start"))
    right = {"data": masked, "model": model, "output": str(tmp_path / "out")}
    refused("does not exist or is empty; give the folder that `mask` wrote", **right | {"data": str(tmp_path / "no")})
    refused("is the data folder", **right | {"output": masked})
    refused("--num-workers 27: .* has only 26 rows", **right | {"num_workers": 27})
    refused("lacks the columns prompt_ids", **right | {"objective": "dpo"})
    refused("cannot load the", **right | {"model": str(tmp_path / "no")})

    scored = tmp_path / "scored"
    shutil.copytree(masked, scored)
    storage.write_json({"stage": "score"}, f"{scored}/manifest.json")
    refused("was written by score", **right | {"data": str(scored)})
    storage.remove_file(f"{scored}/manifest.json")
    refused("its mask job has not finished", **right | {"data": str(scored)})

    larger = write_model(tmp_path / "larger", vocab_size=600)
    refused("masked for a vocabulary of", **right | {"model": larger})
    refused("larger has a vocabulary of 600", **right | {"objective": "dpo", "reference_model": larger})
    deeper = write_model(tmp_path / "deeper", num_hidden_layers=3)
    refused("num_hidden_layers 2.*has num_hidden_layers 3", **right | {"model": deeper})
    adapter = tmp_path / "adapter"
    storage.write_json({"peft_type": "LORA", "base_model_name_or_path": model}, f"{adapter}/adapter_config.json")
    with_adapter = write_masked(tmp_path / "with-adapter", sft_rows(4), str(adapter))
    refused("adapter .num_hidden_layers 2.*has num_hidden_layers 3", **right | {"data": with_adapter, "model": deeper})
    other = write_model(tmp_path / "other")
    tokenizer = byte_level(CHATML)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    swap = {"a": content["model"]["vocab"]["b"], "b": content["model"]["vocab"]["a"]}
    content["model"]["vocab"] |= swap
    Path(other, "tokenizer.json").write_text(json.dumps(content))
    refused("masked for another tokenizer", **right | {"model": other})

    pairs = write_masked(tmp_path / "pairs", pair_rows(4), model)
    dpo = right | {"data": pairs, "objective": "dpo"}
    refused("has no reference log-probabilities", **dpo)
    with_sums = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in pair_rows(4)]
    sums = write_masked(tmp_path / "sums", with_sums, model)
    refused("ratio needs them per token", **dpo | {"data": sums, "dpo_mask": "ratio"})
    refused("--max-length cuts responses", **dpo | {"data": sums, "max_length": 8})

    Path(tmp_path / "taken").mkdir()
    Path(tmp_path / "taken" / "notes.txt").write_text("mine")
    refused("already holds files that no alphatoken run wrote", **right | {"output": str(tmp_path / "taken")})
    assert not storage.exists(str(tmp_path / "out"))


def test_lora_targets_that_no_layer_is_called(tmp_path, model, masked, monkeypatch):
    monkeypatch.setattr("pipelines.train.connect", lambda: pytest.fail("training was about to start"))
    right = {"data": masked, "model": model, "output": str(tmp_path / "out"), "lora_rank": 2}
    layers = "its linear layers are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head$"
    refused(f"no layer of {model} is called nope; {layers}", **right, lora_targets=["nope"])
    for name in ("proj", "mlp", "norm", "all-linear"):  # half a name, no layer, no matrix, no shorthand in a list
        refused(f"is called {name}; ", **right, lora_targets=["q_proj", name])
    assert not storage.exists(str(tmp_path / "out"))


LORA_TARGETS = {
    "llama": ["q_proj", "layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "h.0.mlp.c_fc", "wte"],
}


@pytest.mark.parametrize("architecture", LORA_TARGETS)
def test_lora_targets_that_peft_takes(tmp_path, masked, architecture, monkeypatch):
    from peft import get_peft_model

    name = write_model(tmp_path / "model", architecture=architecture)
    for target in LORA_TARGETS[architecture]:
        config = TrainConfig(data=masked, model=name, output="o", lora_rank=2, lora_targets=[target])
        check_lora_targets(config)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(name), _lora(config))
        assert any("lora_" in key for key, _ in adapted.named_parameters())
    monkeypatch.setattr("pipelines.lora_targets.meta_model", lambda *_: torch.tensor([]).nope)
    check_lora_targets(config.model_copy(update={"lora_targets": ["nope"]}))  # left to the workers


def test_settings_that_do_not_fit_together():
    base = {"data": "d", "model": "m", "output": "o"}
    for settings, match in (
        ({"early_stopping": 2}, "needs --evaluation"),
        ({"reference_model": "m"}, "is for --objective dpo"),
        ({"lora_targets": ["q_proj"]}, "--lora-targets needs --lora-rank"),
        ({"lora_alpha": 16}, "--lora-alpha needs --lora-rank"),
        ({"lora_dropout": 0.1}, "--lora-dropout needs --lora-rank"),
        ({"fsdp": True}, "needs GPUs"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(**base, **settings)
    TrainConfig(**TrainConfig(**base, lora_alpha=32).model_dump())  # defaults say nothing
