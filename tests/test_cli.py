import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions, SamplingOptions
from alphatoken.mask_config import MaskConfig
from alphatoken.rounds_config import RoundsConfig
from alphatoken.train_config import TrainConfig
from jobs import cli, main
from jobs.mask import show_mask
from jobs.score import show_score

ROOT = Path(__file__).parents[1]
GIVEN = ["--input", "scored", "--output", "masked"]


def parse(argv, config_class=MaskConfig):
    """The configuration that `argv` makes."""
    seen = []
    code = cli.run(config_class, lambda config: seen.append(config), argv)
    assert code == 0
    return seen[0]


def refused(argv, capsys, config_class=MaskConfig):
    """What stderr says of `argv`, line by line."""
    assert cli.run(config_class, lambda config: None, argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.splitlines()


def test_every_kind_of_option():
    config = parse([*GIVEN, "--keep-fraction", "0.5", "--min-value", "-1e-3", "--protect", "word", "newline",
                    "--protect", "end-of-turn", "--weights", "--no-overwrite", "--scope=dataset"])  # fmt: skip
    assert config.keep_fraction == 0.5 and config.min_value == -1e-3
    assert config.protect == ["word", "newline", "end-of-turn"]
    assert config.weights is True and config.overwrite is False and config.scope == "dataset"
    score = parse(
        ["--output", "o", "--model", "m", "--data", "a", "b", "--validation", "v",
         "--class-weights", "end-of-turn=0", "word=1.5", "--columns", "prompt=a=b"], ScoreConfig
    )  # fmt: skip
    assert score.class_weights == {"end-of-turn": 0.0, "word": 1.5}
    assert score.columns == {"prompt": "a=b"} and score.data == ["a", "b"]


def test_yaml_and_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("input: a\nkeep-fraction: 0.3\nstability_weight: 2\nprotect: [word]\noutput: b\n")
    config = parse(["--config", str(file), "--stability-weight", "0.5", "--output", "c"])
    assert (config.input, config.output) == ("a", "c")
    assert (config.keep_fraction, config.stability_weight, config.protect) == (0.3, 0.5, ["word"])
    file.write_text("preset: paper\n")
    assert parse([*GIVEN, "--config", str(file)]).keep_fraction == 0.5
    file.write_text("num_actors: 2\nmodel: m\ndata: [a]\nvalidation: [v]\noutput: o\n")
    assert parse(["--config", str(file)], ScoreConfig).num_actors == "2"


@pytest.mark.parametrize(
    ("option", "value"), [("keep_fraction", 0.3), ("estimator", "exact"), ("class_weights", {"digits": 0.0}),
    ("preconditioner", "adam"), ("refresh_every", 5), ("validation", ["v"]), ("rule", "suspect")]
)  # fmt: skip
def test_options_of_live_values_are_refused_where_masks_are_there_already(option, value):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} needs --in-run"):
        TrainConfig(data=["d"], model="m", output="o", **{option: value})
    TrainConfig(**TrainConfig(data=["d"], model="m", output="o", beta=0.3).model_dump())


def test_options_without_an_effect_are_refused():
    in_run = {"data": ["d"], "model": "m", "output": "o", "in_run": True, "validation": ["v"]}
    with pytest.raises(ValueError, match="--keep-fraction is a setting of --rule share, not of surprising"):
        TrainConfig(**in_run, rule="surprising", keep_fraction=0.5)
    score = {"data": ["d"], "model": "m", "output": "o"}
    with pytest.raises(ValueError, match="--preconditioner-data is for --preconditioner adam"):
        ScoreConfig(**score, validation=["v"], preconditioner_data=["d"])
    with pytest.raises(ValueError, match="--fisher: for exact and value_propagation; loss is about no weights"):
        ScoreConfig(**score, estimator="loss", fisher="f", reference_model="r")
    with pytest.raises(ValueError, match="--method, --normalization, --validation: for exact and value_propagation"):
        ScoreConfig(**score, estimator="entropy", validation=["v"], normalization="sequence", method="forward")
    with pytest.raises(ValueError, match="--method is for --estimator exact"):
        ScoreConfig(**score, estimator="value_propagation", validation=["v"], method="central")
    for config, given in ((ScoreConfig, score), (DirectionConfig, {"model": "m", "output": "o"})):
        with pytest.raises(ValueError, match="--positions response is defined for linear weights"):
            config(**given, validation=["v"], positions="response", parameters="all")
    with pytest.raises(ValueError, match="--engine-options are for --engine vllm"):
        EngineOptions(engine="transformers", engine_options={"max_num_seqs": 4})


def test_engine_options_have_types_on_the_command_line():
    given = {"max_num_seqs": "16", "gpu_memory_utilization": "0.8", "enforce_eager": "False", "quantization": "fp8"}
    found = EngineOptions(engine_options=given).engine_options
    assert found == {
        "max_num_seqs": 16, "gpu_memory_utilization": 0.8, "enforce_eager": False, "quantization": "fp8"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": ["a", ""]}, "an empty text would end every response"),
        ({"temperature": float("inf")}, "finite"),
        ({"temperature": float("nan")}, "finite"),
    ],
)
def test_what_no_sampling_can_do(changes, message):
    rounds = {"data": ["d"], "model": "m", "output": "o", "validation": ["v"], "objective": "dpo", "generate": 2}
    for config, given in ((SamplingOptions, {}), (RoundsConfig, rounds)):
        with pytest.raises(ValueError, match=message):
            config(**given, **changes)


def test_an_engine_option_that_yaml_cannot_read():
    with pytest.raises(ValueError, match=r"quantization=\[1 is no value that YAML can read"):
        EngineOptions(engine_options={"quantization": "[1"})


def test_a_range_in_yaml_is_no_number_in_base_60(tmp_path):
    (tmp_path / "run.yaml").write_text("num_actors: 1:4\nmax_length: 1_024\nbeta: 1.5e-1\n")
    options = {"config": str(tmp_path / "run.yaml"), "model": "m", "data": ["d"], "output": "o", "validation": ["v"]}
    config = cli._build(ScoreConfig, options)
    assert config.num_actors == "1:4" and config.max_length == 1024 and config.beta == 0.15


def test_a_manifest_is_a_config_file(tmp_path):
    config = MaskConfig(input="i", output="o", keep_fraction=0.4, min_value=0.1)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"stage": "mask", "counts": {}, "config": config.model_dump(mode="json")}))
    assert parse(["--config", str(file)]) == config


@pytest.mark.parametrize("name", ["manifest.json", "run"])
def test_a_manifest_with_any_characters_is_a_config_file(tmp_path, name):
    """Those that JSON escapes as two halves, too."""
    config = MaskConfig(input="runs/😀 é", output="o")
    file = tmp_path / name
    file.write_text(json.dumps({"stage": "mask", "config": config.model_dump(mode="json")}, indent=2))
    assert "\\ud83d" in file.read_text() and parse(["--config", str(file)]) == config


def test_errors_are_sentences(capsys, tmp_path):
    assert refused([*GIVEN, "--keep-fraction", "1.5"], capsys) == [
        "alphatoken mask: --keep-fraction 1.5: input should be less than or equal to 1"
    ]
    assert refused([], capsys) == ["alphatoken mask: --output is required", "alphatoken mask: --input is required"]
    assert "--scope batch: input should be 'sequence' or 'dataset'" in refused([*GIVEN, "--scope", "batch"], capsys)[0]
    assert "--keep-fractoin; did you mean --keep-fraction?" in refused([*GIVEN, "--keep-fractoin", "1"], capsys)[0]
    assert "--output: expected one argument" in refused(["--input", "a", "--output"], capsys)[0]
    score = ["--output", "o", "--model", "m", "--data", "a"]
    assert "give either --validation" in refused(score, capsys, ScoreConfig)[0]
    made = [*score, "--direction", "g.safetensors", "--class-weights", "digits=0", "--normalization", "sequence"]
    assert "--class-weights, --normalization: how a direction is made" in refused(made, capsys, ScoreConfig)[0]
    assert "last-layers:K" in refused([*score, "--parameters", "q"], capsys, ScoreConfig)[0]
    assert "--columns prompt: give it as KEY=VALUE" in refused([*score, "--columns", "prompt"], capsys, ScoreConfig)[0]
    twice = [*score, "--columns", "prompt=a", "--columns", "prompt=b"]
    assert "--columns gives prompt twice, as a and as b; give it once" in refused(twice, capsys, ScoreConfig)[0]
    assert "unknown option stray" in refused([*GIVEN, "stray"], capsys)[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("keep_fractoin: 1", "unknown name keep_fractoin; did you mean keep_fraction?"),
        ("- 1", "has to be a mapping"),
        ("a: [", "is not valid YAML"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_bad_config_files(tmp_path, capsys, content, message):
    file = tmp_path / "c.yaml"
    if content:
        file.write_text(content)
    lines = refused([*GIVEN, "--config", str(file)], capsys)
    assert len(lines) == 1 and message in lines[0] and str(file) in lines[0]


def test_results_and_exit_codes(capsys):
    class Config(BaseModel):
        """Nothing."""

    def fail(error):
        def main(config):
            raise error

        return main

    assert cli.run(Config, lambda config: {"a": 1}, ["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert cli.run(Config, lambda config: {"a": [1.0, float("nan")], "b": {"c": float("-inf")}}, ["--json"]) == 0
    assert capsys.readouterr().out == '{"a": [1.0, null], "b": {"c": null}}\n'
    shown = []
    assert cli.run(Config, lambda config: {"a": 1}, [], show=lambda config, result: shown.append(result)) == 0
    assert shown == [{"a": 1}] and capsys.readouterr().out == ""
    assert cli.run(Config, fail(UserError("no such thing")), []) == 2
    assert capsys.readouterr().err == "alphatoken : no such thing\n"
    assert cli.run(Config, fail(KeyError("x")), []) == 1
    assert "KeyError: 'x' (--debug shows where)" in capsys.readouterr().err
    assert cli.run(Config, fail(KeyError("x")), ["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.run(Config, fail(KeyboardInterrupt()), []) == 130


def test_help_says_default_choices_and_required(capsys):
    assert cli.run(MaskConfig, lambda config: None, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "part of the response tokens to keep (the paper's rho) (default: 0.8)" in text
    assert "(one of sequence, dataset; default: sequence)" in text
    assert "(required)" in text and "--weights, --no-weights" in text


def test_unknown_command(capsys):
    assert main.main(["maks"]) == 2
    assert capsys.readouterr().err == "alphatoken: unknown command maks; did you mean mask?\n"
    assert main.main(["zzz"]) == 2
    assert "there are fisher, direction" in capsys.readouterr().err


def test_help_of_a_default_that_depends_on_other_options_says_on_which(capsys):
    assert cli.run(TrainConfig, lambda config: None, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "default: suspect; share where a share is asked for; dpo: share in-run, none in rounds" in text
    in_run = {"data": ["d"], "model": "m", "output": "o", "in_run": True, "validation": ["v"]}
    for given in ({}, {"keep_fraction": 0.5}, {"objective": "dpo"}):
        config = TrainConfig(**in_run, **given)
        found = (config.rule, config.plain_steps, config.refresh_every)
        assert found == (("share", 0, 10) if given else ("suspect", 12, 12))


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["mask", "--help"], ["mask", "--keep-fraction", "9"]])
def test_help_and_errors_load_nothing_heavy(argv):
    code = (
        "import sys; from jobs.main import main; code = main(sys.argv[1:]); "
        "loaded = {'torch', 'ray', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert "loaded" not in done.stderr
    assert done.returncode == (2 if "9" in argv else 0)


def test_a_reader_may_stop_reading(tmp_path):
    command = f"{sys.executable} {ROOT / 'jobs' / 'main.py'} completion bash | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[1] == "0" and done.stderr == ""


def test_every_command_has_json_debug_and_its_config():
    for name, (module, _) in main.COMMANDS.items():
        parser = argparse.ArgumentParser()
        cli.add_options(parser, importlib.import_module(module).CONFIG, f"alphatoken {name}")
        options = set(parser._option_string_actions)
        assert {"--json", "--debug", "--config"} <= options and ("--dry-run" in options) == (name in cli.HEAVY)


def test_scores_tell_of_special_tokens(capsys):
    counts = {"rows_in": 9, "rows_out": 8, "response_tokens": 5, "tokens": 20, "rows_truncated": 0}
    counts |= {"rows_quarantined": 0, "rows_special_tokens": 3}
    config = ScoreConfig(output="o", model="m", data=["d"], validation=["v"])
    show_score(config, {"counts": counts, "seconds": 1.0})
    assert re.search(r"special tokens +3 rows have some in their text", capsys.readouterr().out)
    show_score(config, {"counts": counts | {"rows_special_tokens": 0}, "seconds": 1.0})
    assert "special" not in capsys.readouterr().out


def test_masks_tell_of_tokens_in_dropped_rows(capsys):
    counts = {"rows_in": 9, "rows_out": 7, "rows_quarantined": 1, "rows_dropped_sequences": 1, "response_tokens": 1050}
    counts |= {"kept_tokens": 1000, "dropped_row_tokens": 50, "kept_fraction": 0.952381}
    show_mask(MaskConfig(input="i", output="o"), {"counts": counts, "rule": "share"})
    shown = " ".join(capsys.readouterr().out.split())
    assert "kept 95.2% of 1,050 response tokens" in shown and "rows quarantined 1 (reasons" in shown
    assert "rows dropped sequences 1 (50 of the response tokens; reasons in quarantine/)" in shown


def test_a_job_runs_as_a_file(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "mask.py"), "--input", "none", "--output", "out"],
        cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "none does not exist or is empty" in done.stderr.splitlines()[-1]
