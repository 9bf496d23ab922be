"""The evaluate job: files and models in, a table out."""

import io
import json
import math
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model
from tiny_tokenizers import byte_level

from alphatoken.errors import UserError
from alphatoken.evaluate_config import EvaluateConfig
from alphatoken.evaluation import answer_accuracy, choice_accuracy, estimate, token_loss
from alphatoken.evaluation_rows import VERIFIERS
from alphatoken.model import load_model
from alphatoken.sources import plan_units
from alphatoken.tokenizer import load_tokenizer
from jobs import evaluate as job
from pipelines import suites
from pipelines.evaluate import _Used, make_reader, run_evaluate, usable_items

TEXTS = ["The answer is four.", "two plus three is five", "Hello there, how are you today?", "You are helpful"]
CHOICES = [" four", " five today", " you"]
QUESTIONS = [{"query": text, "choices": CHOICES, "answer": i % 3} for i, text in enumerate(TEXTS)]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"#### {i}"}]}
    for i, text in enumerate(TEXTS)
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return {
        "text": write(folder / "text.jsonl", [{"text": text} for text in TEXTS]),
        "questions": write(folder / "questions.jsonl", [*QUESTIONS, QUESTIONS[0] | {"answer": 7}]),
        "chats": write(folder / "chats.jsonl", CHATS),
    }


@pytest.fixture(scope="module")
def other_checkpoint(tiny_checkpoint, tmp_path_factory):
    """The same tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("after") / "tiny-after"
    model = load_model(tiny_checkpoint).model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_tokenizer(tiny_checkpoint).save_pretrained(folder)
    return str(folder)


def by_name(result: dict) -> dict[str, dict]:
    return {f"{line['kind']} {line['file']} {line['measure']}": line for line in result["measures"]}


@pytest.mark.usefixtures("local_ray")
def test_two_models_on_every_kind_of_file(tiny_checkpoint, other_checkpoint, files, tmp_path, capsys, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr("jobs.progress.Console", lambda **_: terminal)
    output = tmp_path / "out" / "table.json"
    arguments = ["--model", tiny_checkpoint, other_checkpoint]
    arguments += ["--loss", f"web={files['text']}", f"chat={files['chats']}"]
    arguments += ["--choices", f"quiz={files['questions']}", "--answers", f"sums={files['chats']}"]
    arguments += ["--max-new-tokens", "4", "--dtype", "float32", "--output", str(output)]
    assert job.main(arguments) == 0
    rows = 2 * (len(TEXTS) + 2 * len(CHATS) + len(QUESTIONS))
    assert f"{rows} of {rows + 2}" in terminal.file.getvalue()  # the bad question is never dealt with
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    table = by_name(result)
    assert list(table) == [
        "loss web loss", "loss web perplexity", "loss chat loss", "loss chat perplexity", "choices quiz accuracy",
        "choices quiz accuracy_normalized", "answers sums accuracy",
    ]  # fmt: skip

    config = EvaluateConfig(**result["config"])  # the output can be run again
    assert config.model == [tiny_checkpoint, other_checkpoint]
    expected: dict[str, list] = {name: [] for name in table}
    for model in config.model:
        scoring, reader = load_model(model, "float32"), make_reader(config, model)

        def items(kind, path, reader=reader):
            return list(usable_items(reader, kind, plan_units([path]), None, _Used()))

        for name, file in (("web", "text"), ("chat", "chats")):
            loss = estimate(token_loss(scoring, items("loss", files[file]), 4096))
            expected[f"loss {name} loss"].append(loss)
            expected[f"loss {name} perplexity"].append(loss.exp())
        plain, normalized = choice_accuracy(scoring, items("choices", files["questions"]), 4096)
        expected["choices quiz accuracy"].append(estimate(plain))
        expected["choices quiz accuracy_normalized"].append(estimate(normalized))
        prompts = items("answers", files["chats"])
        solved, _ = answer_accuracy(
            scoring, reader.tokenizer, prompts, VERIFIERS["number"], max_new_tokens=4, batch_tokens=4096
        )
        expected["answers sums accuracy"].append(estimate(solved))
    for name, estimates in expected.items():
        for found, each in zip(table[name]["values"], estimates, strict=True):
            assert found["value"] == pytest.approx(each.value, rel=1e-4)
            assert found["standard_error"] == pytest.approx(each.standard_error, rel=1e-3)
        change = estimates[1] - estimates[0]
        assert table[name]["difference"]["value"] == pytest.approx(change.value, rel=1e-3, abs=1e-6)
        assert table[name]["difference"]["standard_error"] == pytest.approx(change.standard_error, rel=1e-3)
    assert table["loss web loss"]["difference"]["value"] != 0

    counts = {(file["model"], file["file"]): file for file in result["files"]}
    assert len(counts) == 8
    quiz = counts[tiny_checkpoint, "quiz"]
    assert (quiz["rows"], quiz["rows_refused"]) == (4, 1) and "7 is none of the 3 choices" in quiz["refused"][0]
    assert set(result["fingerprints"]["models"]) == set(config.model)
    assert "web: perplexity" in printed and "tiny-after" in printed and "1 left out" in printed


@pytest.mark.usefixtures("local_ray")
def test_a_file_without_a_usable_row_is_one_sentence(tiny_checkpoint, files, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [QUESTIONS[0] | {"answer": 9}] * 2)
    with pytest.raises(UserError, match="--choices quiz: no row can be used; the first problem: .*9 is none of the 3"):
        run_evaluate(EvaluateConfig(model=[tiny_checkpoint], choices={"quiz": bad}))


def test_usable_items_are_counted_and_limited(tiny_checkpoint, files, tmp_path, monkeypatch):
    config = EvaluateConfig(model=["m"], choices=files, max_length=300)
    reader, units = make_reader(config, tiny_checkpoint), plan_units([files["questions"]])
    used = _Used()
    assert len(list(usable_items(reader, "choices", units, None, used))) == used.rows == 4
    assert len(used.refused) == 1 and "questions.jsonl, row 4" in used.refused[0]
    used = _Used()
    assert [question.row_id for question in usable_items(reader, "choices", units, 2, used)] == [0, 1]
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, QUESTIONS)
    pq.write_table(pa.Table.from_pylist(QUESTIONS), tmp_path / "c.parquet", row_group_size=1)  # in units of their own
    monkeypatch.setattr("alphatoken.sources.UNIT_ROWS", 1)
    units, used = plan_units([str(tmp_path)]), _Used()
    assert len(units) == 2 + len(QUESTIONS)
    found = list(usable_items(reader, "choices", units, 3, used))  # the limit is of each file
    assert len({question.row_id for question in found}) == used.rows == 9
    assert reader.encoder.options.max_length == 256  # the model has no more positions


@pytest.fixture
def no_ray(monkeypatch):
    """Mistakes that have to be told before Ray starts and a model loads."""

    def fail(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("pipelines.evaluate.connect", fail)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"choices": {"a": "text"}}, "do not form a multiple-choice question: found text"),
        ({"answers": {"a": "text"}}, "known format"),
        ({"loss": {"a": "questions"}}, "for --loss also text"),
        ({"loss": {"a": "nowhere.jsonl"}}, "No data file matches"),
        ({"loss": {"a": "text"}, "columns": {"text": "body"}}, "names body, which no file has: they have text"),
        ({"loss": {"a": "text"}, "columns": {"txt": "text"}}, "no such column to fill"),
        ({"answers": {"a": "chats"}, "max_new_tokens": 300}, "leaves no room for a prompt"),
        ({"loss": {"a": "text"}, "model": ["/nowhere"]}, "cannot load"),
        ({"loss": {"a": "text"}, "lm_eval": ["arc_easy"]}, "lm-eval, which is not installed"),
    ],
)
def test_mistakes_are_told_before_anything_starts(settings, reason, tiny_checkpoint, files, no_ray):
    for kind in ("loss", "choices", "answers"):
        if kind in settings:
            settings = settings | {kind: {name: files.get(path, path) for name, path in settings[kind].items()}}
    with pytest.raises(UserError, match=reason):
        run_evaluate(EvaluateConfig(**({"model": [tiny_checkpoint], "max_new_tokens": 8} | settings)))


def test_an_output_that_cannot_be_written_is_told_before_anything_starts(tiny_checkpoint, files, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("pipelines.evaluate.connect", lambda: started.append(True) or 1 / 0)
    config = EvaluateConfig(model=[tiny_checkpoint], loss={"web": files["text"]}, max_new_tokens=8)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (("file/a.json", "cannot be written: .*; give another place"), ("folder.json", "is a folder")):
        output = str(tmp_path / name)
        with pytest.raises(UserError, match=f"--output {output} {reason}"):
            run_evaluate(config.model_copy(update={"output": output}))
    assert not started
    with pytest.raises(ZeroDivisionError):
        run_evaluate(config.model_copy(update={"output": str(tmp_path / "new" / "a.json")}))
    assert list((tmp_path / "new").iterdir()) == []  # nothing of the trial is left


def test_a_tokenizer_without_a_chat_template(tiny_checkpoint, files, tmp_path, no_ray):
    tokenizer = byte_level(None)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="chat template"):
        run_evaluate(
            EvaluateConfig(model=[tiny_checkpoint, str(tmp_path)], answers={"sums": files["chats"]}, max_new_tokens=8)
        )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--loss", "a=b"], "--model is required"),
        (["--model", "m"], "nothing to evaluate"),
        (["--model", "m", "m", "--loss", "a=b"], "names a model twice"),
        (["--model", "m", "--loss", "file.jsonl"], "KEY=VALUE"),
        (["--model", "m", "--loss", "a=b", "--output", "results"], "ends in .json"),
        (["--model", "m", "--loss", "a=b", "--verifier", "regex"], "--verifier"),
        (["--model", "m", "--loss", "a=b", "--limit", "0"], "--limit 0"),
    ],
)
def test_wrong_options(arguments, reason, capsys):
    assert job.main(arguments) == 2
    assert reason in capsys.readouterr().err


def test_configuration():
    config = EvaluateConfig(model="m", lm_eval="arc_easy,hellaswag", choices={"b": "x"}, loss={"a": "y", "b": "z"})
    assert config.model == ["m"] and config.lm_eval == ["arc_easy", "hellaswag"]
    assert config.files == [("loss", "a", "y"), ("loss", "b", "z"), ("choices", "b", "x")]
    assert set(EvaluateConfig.model_fields["verifier"].annotation.__args__) == set(VERIFIERS)


def test_lm_eval_is_called_and_its_results_are_lines(monkeypatch, tiny_checkpoint):
    def simple_evaluate(**settings):
        score = 0.25 if settings["model_args"]["pretrained"] == tiny_checkpoint else 0.5
        assert settings["tasks"] == ["arc_easy"] and settings["limit"] == 8 and settings["model"] == "hf"
        metrics = {"alias": "arc_easy", "acc,none": score, "acc_stderr,none": 0.03}
        return {"results": {"arc_easy": metrics | {"em,strict": 1, "em_stderr,strict": "N/A"}}}

    fake = types.ModuleType("lm_eval")
    fake.simple_evaluate = simple_evaluate
    fake.__spec__ = types.SimpleNamespace(name="lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setattr(suites, "prepare_worker", lambda threads: None)
    suites.check_installed()
    config = EvaluateConfig(model=[tiny_checkpoint, "other"], lm_eval=["arc_easy"], limit=8)
    found = {model: suites.run_suites._function(config, model, 1) for model in config.model}
    accuracy, match = suites.suite_measures(config.model, found)
    assert [value["value"] for value in accuracy["values"]] == [0.25, 0.5]
    assert accuracy["difference"] == {"value": 0.25, "standard_error": pytest.approx(math.sqrt(2) * 0.03)}
    assert match["measure"] == "em (strict)" and match["values"][0] == {"value": 1.0, "standard_error": None}
    assert list(suites.suite_measures(config.model, {})) == []
