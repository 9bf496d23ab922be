"""`--dry-run` of every heavy command: what it finds and refuses, without weights, Ray or a file written."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from alphatoken import schema, storage, tensor_file
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.fisher_config import FisherConfig
from alphatoken.rounds_config import RoundsConfig
from alphatoken.run_folder import UNKNOWN, RunFolder
from jobs import cli, main
from pipelines import dry_run
from pipelines.direction_identity import direction_run
from pipelines.fisher import fisher_run
from pipelines.train import train_identity
from pipelines.train_checks import check_train
from tests.masked_folder import pair_rows, sft_rows, write_masked, write_model

REFERENCE = {f"ref_{side}_logps": -1.0 for side in schema.BRANCHES}


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch):
    """Neither weights nor Ray."""

    def refuse(*_, **__):
        raise AssertionError("a dry run must not get here")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    turn = {"role": "user", "content": "What is two plus two?"}
    rows = [
        {"id": str(n), "messages": [turn, {"role": "assistant", "content": "It is four. " * n}]} for n in range(1, 9)
    ]
    rows.insert(3, {"id": "bad", "messages": [turn]})
    pairs = [{"prompt": "Two?", "chosen": f" two {n}", "rejected": " three"} for n in range(4)]
    found = {}
    for name, content in {"rows": rows, "pairs": pairs, "other": [{"text": "x"}]}.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        found[name] = str(path)
    return found


@pytest.fixture(scope="module")
def masked(tmp_path_factory, tiny_checkpoint) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("masked")
    rows = {"sft": sft_rows(10), "dpo": [row | REFERENCE for row in pair_rows(5)]}
    return {name: write_masked(folder / name, found, tiny_checkpoint) for name, found in rows.items()}


@pytest.fixture(scope="module")
def responses(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("responses"))
    row = {"row_id": 0, "id": "q", "sample": 0, "prompt": "2 + 2?", "text": "4", "token_ids": [1]}
    table = pa.Table.from_pylist([row], schema=schema.RESPONSES)
    storage.write_table(table, storage.join(folder, "data", "train-000000000000000.parquet"))
    counts = {"prompts": 6, "rows_out": 24}
    manifest = {"stage": "generate", "counts": counts, "config": {"samples": 4}, "fingerprints": {"model": "m"}}
    storage.write_json(manifest, storage.join(folder, "manifest.json"))
    return folder


@pytest.fixture
def commands(tiny_checkpoint, files, masked, responses) -> dict[str, list[str]]:
    model, data, validation = ["--model", tiny_checkpoint], ["--data", files["rows"]], ["--validation", files["rows"]]
    prompts = ["--prompts", files["rows"], "--engine", "transformers", "--max-new-tokens", "8"]
    return {
        "score": [*model, *data, *validation],
        "direction": [*model, *validation],
        "fisher": [*model, *prompts, "--num-prompts", "5"],
        "generate": [*model, *prompts, "--samples", "3"],
        "pair": ["--input", responses, "--max-pairs", "2"],
        "train": [*model, "--data", masked["sft"], "--epochs", "2"],
        "rounds": [*model, *data, *validation, "--per-device-batch-size", "1", "--plain-steps", "2"],
    }


def outcome(command: list[str], capsys) -> tuple[int, dict, str]:
    """(exit code, the JSON result, stderr)."""
    code = main.main([*command, "--dry-run", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


@pytest.mark.parametrize(
    "command, expected",
    [
        ("score", {"rows": 9, "unusable_rows": 1, "validation_rows": 8, "parameters": "all-linear", "data": "rows"}),
        ("direction", {"rows": 9, "unusable_rows": 1, "parameters": "all-linear"}),
        ("fisher", {"prompts": 9, "used_prompts": 5, "longest_response": 8, "engine": "transformers"}),
        ("generate", {"prompts": 9, "responses": 27, "longest_response": 8}),
        ("pair", {"prompts": 6, "responses": 24, "most_pairs": 12, "judge": "verifier"}),
        ("train", {"rows": 10, "steps": 6, "batch_rows": 4, "objective": "sft"}),
        ("rounds", {"rows": 9, "steps": 8, "windows": 1, "rule": "suspect"}),
    ],
)
def test_every_heavy_command_says_what_it_would_do(command, expected, commands, tmp_path, capsys):
    assert command in cli.HEAVY
    output = tmp_path / "out"
    code, found, _ = outcome([command, *commands[command], "--output", str(output)], capsys)
    assert code == 0 and found["dry_run"] is True and found["state"] == "new" and found["output"] == str(output)
    assert {name: found.get(name) for name in expected} == expected
    assert not output.exists() and list(tmp_path.iterdir()) == []
    assert main.main([command, *commands[command], "--output", str(output), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("dry run: the checks passed, nothing was written\n")


def test_tokens_are_those_of_the_plan(commands, tiny_checkpoint, files, tmp_path, capsys):
    from alphatoken.config import DataOptions
    from alphatoken.model_encoder import make_encoder
    from alphatoken.sources import plan_units
    from pipelines.encode import good_rows

    refused: list[str] = []
    encoder = make_encoder(tiny_checkpoint, DataOptions())
    rows = [row for _, row in good_rows(plan_units([files["rows"]]), encoder.encode, refused)]
    _, found, _ = outcome(["score", *commands["score"], "--output", str(tmp_path / "out")], capsys)
    assert found["tokens"] == pytest.approx(sum(len(row.input_ids) for row in rows), abs=1)
    assert found["response_tokens"] == pytest.approx(sum(sum(row.response_mask) for row in rows), abs=1)
    assert len(found["reasons"]) == 1 and found["reasons"][0].startswith("1 x ")


def test_rounds_leave_room_for_prompts_in_models_with_learned_positions(files, tmp_path, capsys):
    model = write_model(tmp_path / "gpt2", architecture="gpt2")  # 256 positions
    command = ["rounds", "--objective", "dpo", "--generate", "2", "--model", model, "--data", files["rows"]]
    command += ["--validation", files["rows"], "--output", str(tmp_path / "out"), "--max-new-tokens"]
    code, found, stderr = outcome([*command, "200"], capsys)
    assert code == 0 and found["rows"] == 9, stderr
    code, found, stderr = outcome([*command, "255"], capsys)
    assert code == 2 and "from 1 to 1 leave room for the response" in stderr
    code, _, stderr = outcome([*command, "256"], capsys)
    assert code == 2 and "--max-new-tokens 256 leaves no room for a prompt" in stderr and "have 256 tokens" in stderr


def test_rounds_know_their_verifier(files, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    """By its name, and a run by the text of its module."""
    monkeypatch.chdir(tmp_path)
    Path("checks_of_rounds.py").write_text("def f(response, answer): return 1.0\n")
    settings = {"model": tiny_checkpoint, "data": files["rows"], "validation": [files["rows"]], "output": "out"}
    config = RoundsConfig(**settings, objective="dpo", generate=2, verifier="checks_of_rounds:f")
    folder = RunFolder(str(tmp_path / "out"))
    folder.open(train_identity(config, check_train(config)))
    storage.write_json({}, f"{folder.uri}/checkpoints/run/checkpoint_2026-11-28_12-00-00.000000/trainer_state.json")
    assert dry_run.dry_run(config)["state"] == "resume"
    Path("checks_of_rounds.py").write_text("def f(response, answer): return 0.0\n")
    with pytest.raises(UserError, match="different run.*verifier"):
        dry_run.dry_run(config)
    with pytest.raises(UserError, match="--verifier nosuch:f: No module named 'nosuch'"):
        dry_run.dry_run(config.model_copy(update={"verifier": "nosuch:f", "output": "other"}))


def test_an_adapter_can_be_scored(commands, tiny_checkpoint, tmp_path, capsys):
    config = {"base_model_name_or_path": tiny_checkpoint, "peft_type": "LORA", "r": 2}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for command in ("score", "direction"):
        given = [tiny_checkpoint, str(tmp_path / "adapter")]
        words = [given[1] if word == given[0] else word for word in commands[command]]
        words += ["--parameters", "lora", "--output", str(tmp_path / "o")]
        code, found, stderr = outcome([command, *words], capsys)
        assert (code, found.get("parameters")) == (0, "lora"), stderr
    stability = ["--fisher", "f", "--reference-model", tiny_checkpoint]
    data, model = commands["score"][2:], ["--model", given[1], "--output", str(tmp_path / "o")]
    code, _, stderr = outcome(["score", *model, *data, *stability], capsys)
    assert code == 2 and "whose base weights have not moved" in stderr


@pytest.mark.parametrize("command", cli.HEAVY)
def test_the_same_errors_as_the_run_itself(command, commands, files, tmp_path, capsys):
    given = commands[command] + ["--output", str(tmp_path / "out")]
    source = {"pair": "--input", "direction": "--validation", "fisher": "--prompts", "generate": "--prompts"}
    place = given.index(source.get(command, "--data")) + 1
    given[place] = str(tmp_path / "nothing")
    code, _, stderr = outcome([command, *given], capsys)
    assert code == 2 and "nothing" in stderr.splitlines()[-1] and "Traceback" not in stderr
    if command not in ("pair", "train"):
        given[place] = files["other"]
        code, _, stderr = outcome([command, *given], capsys)
        assert code == 2 and "other.jsonl" in stderr and "found text" in stderr
    assert not (tmp_path / "out").exists()


def test_output_folders_of_all_kinds(commands, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["score", *commands["score"], "--output", str(output)]
    config = parsed(commands["score"], output)
    _, identity = dry_run._score(config)
    identity["fingerprints"]["model"] = "that of the weights"
    folder = RunFolder(str(output))
    folder.open(identity)
    folder.write_shard(None, None, {"first_row_id": 0, "row_ids": [[0, 1]], "counts": {}})
    before = sorted(output.rglob("*"))
    assert outcome(command, capsys)[1]["state"] == "resume"
    code, _, stderr = outcome([*command, "--max-length", "64"], capsys)
    assert code == 2 and "output of a different run (config.max_length: 2048 -> 64" in stderr
    assert outcome([*command, "--max-length", "64", "--overwrite"], capsys)[1]["state"] == "replace"
    storage.write_json({}, str(output / "manifest.json"))
    assert outcome(command, capsys)[1]["state"] == "finished"
    assert sorted(output.rglob("*")) == sorted([*before, output / "manifest.json"])
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("x")
    code, _, stderr = outcome(["score", *commands["score"], "--output", str(stranger)], capsys)
    assert code == 2 and "thesis.tex" in stderr


def parsed(argv: list[str], output: Path | str, kind: type = ScoreConfig) -> Any:
    seen: list = []
    assert cli.run(kind, lambda config: seen.append(config), [*argv, "--output", str(output)]) == 0
    return seen[0]


def test_of_a_direction_of_several_targets_all_rows_are_counted(commands, files, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text(Path(files["rows"]).read_text())
    for command in ("direction", "score"):
        given = commands[command][: commands[command].index("--validation") + 1]
        given += [f"a={files['rows']}", f"b={more}", "--output", str(tmp_path / "out")]
        code, found, stderr = outcome([command, *given], capsys)
        assert code == 0, stderr
        assert found["rows" if command == "direction" else "validation_rows"] == {"direction": 18, "score": 16}[command]


@pytest.mark.parametrize("kind", ["direction", "fisher"])
def test_files_of_other_runs_are_replaced_on_demand(kind, commands, tmp_path, capsys):
    path = str(tmp_path / "it.safetensors")
    command = [kind, *commands[kind], "--output", path]
    assert outcome(command, capsys)[1]["state"] == "new"
    config = parsed(commands[kind], path, {"direction": DirectionConfig, "fisher": FisherConfig}[kind])
    about = ("m", "float32")
    run = direction_run(config, "all-linear", "all", *about) if kind == "direction" else fisher_run(config, *about)
    provenance = tensor_file.Provenance(kind=kind, num_rows=1, num_tokens=1, **run)
    tensor_file.save(path, tensor_file.TensorFile(provenance, {}))
    assert outcome(command, capsys)[1]["state"] == "finished"
    other = [*command, "--parameters", "last-layers:1"]
    code, _, stderr = outcome(other, capsys)
    assert code == 2 and "output of a different run (parameters: all-linear -> last-layers:1)" in stderr
    assert outcome([*other, "--overwrite"], capsys)[1]["state"] == "replace"


def test_a_preconditioner_needs_training_rows(commands, tmp_path, capsys):
    command = ["direction", *commands["direction"], "--output", str(tmp_path / "d.safetensors")]
    code, _, stderr = outcome([*command, "--preconditioner", "adam"], capsys)
    assert code == 2 and "needs --preconditioner-data" in stderr


def test_masked_pairs_with_another_reference_load_no_model(masked, tiny_checkpoint, tmp_path, capsys):
    command = ["train", "--objective", "dpo", "--model", tiny_checkpoint, "--data", masked["dpo"]]
    command += ["--reference-model", tiny_checkpoint, "--output", str(tmp_path / "out")]
    code, found, stderr = outcome(command, capsys)
    assert code == 0, stderr
    assert found["rows"] == 5 and found["steps"] == 2
    command[-3] = str(tmp_path / "no-model")
    code, _, stderr = outcome(command, capsys)
    assert code == 2 and "no-model" in stderr


def test_pairs_are_told_from_rows_and_large_inputs_are_not_read(commands, files, tmp_path, capsys, monkeypatch):
    given = [files["pairs"] if word == files["rows"] else word for word in commands["score"]]
    given[given.index("--validation") + 1] = files["rows"]
    command = ["score", *given, "--output", str(tmp_path / "out")]
    found = outcome(command, capsys)[1]
    assert found["data"] == "preference pairs" and found["rows"] == 4 and "unusable_rows" not in found
    monkeypatch.setattr(dry_run, "CHEAP_BYTES", 10)
    assert "alphatoken plan" in outcome(command, capsys)[1]["rows"]


def test_light_commands_have_no_dry_run(capsys):
    assert main.main(["mask", "--input", "a", "--output", "b", "--dry-run"]) == 2
    assert "unknown option --dry-run" in capsys.readouterr().err


def test_what_only_weights_can_tell_agrees_with_anything(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    assert folder.open({"fingerprints": {"model": {"deep": 1}, "data": "d"}}) == "new"
    assert folder.look({"fingerprints": {"model": UNKNOWN, "data": "d"}}) == "resume"
    folder.write_shard(None, None, {"first_row_id": 0, "row_ids": [[0, 0]]})
    with pytest.raises(Exception, match="data: d -> e"):
        folder.look({"fingerprints": {"model": UNKNOWN, "data": "e"}})
