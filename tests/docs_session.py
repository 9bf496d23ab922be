"""A folder with what the pages of the documentation take for granted, and a reader who types what they say.

The models are one tiny random model under every name that a page uses. It has learned to answer any sum with some
number, so that sampled responses are right or wrong. Data files hold a few embedded rows.
"""

import contextlib
import io
import json
import os
import random
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from docs_commands import EXAMPLES, JOB, PLACEHOLDERS, SHELL, SHORTER, config_files, lines, reason_not_to_run
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level

from alphatoken.config import embedded_data
from jobs import main

MODELS = ("M", "base", "Qwen/Qwen3-0.6B")
MOVED_MODELS = ("checkpoint-500",)
SUMS = 12
LESSONS = 60
UNITS = """def same_length(response, answer):
    return len(response) % 2 == 0
"""


def embedded(name: str, count: int) -> list[dict]:
    """The shortest rows of an embedded file."""
    return [json.loads(line) for line in sorted((embedded_data() / name).read_text().splitlines(), key=len)[:count]]


def sums() -> list[dict]:
    return [json.loads(line) for line in (embedded_data() / "sums_prompts.jsonl").read_text().splitlines()[:SUMS]]


def write_models(folder: Path) -> None:
    """`start`, and `moved`: the same after a few steps more."""
    tokenizer, chance = byte_level(CHATML), random.Random(0)
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = sums()
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
    ]
    for name, lessons in (("start", LESSONS), ("moved", 3)):
        for _ in range(lessons):
            answers = [tokenizer(f"It is {chance.choice(rows)['answer']}.<|im_end|>").input_ids for _ in prompts]
            model(**padded(prompts, answers)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def padded(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, torch.Tensor]:
    """input_ids and labels, where answers alone are learned."""
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}


def write_jsonl(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def furnish(folder: Path, models: Path) -> None:
    """Everything that the pages assume to exist: models, data files, a verifier, a bucket."""
    for name in (*MODELS, *MOVED_MODELS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(models / ("moved" if name in MOVED_MODELS else "start"))
    train, target = embedded("train.jsonl", 8), embedded("validation.jsonl", 4)
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(target, folder / "target.jsonl")
    write_jsonl(target[:2], folder / "math.jsonl")
    write_jsonl(target[2:], folder / "code.jsonl")
    write_jsonl(embedded("evaluation.jsonl", 4), folder / "heldout.jsonl")
    write_jsonl(embedded("general.jsonl", 2), folder / "text.jsonl")
    write_jsonl(sums(), folder / "prompts.jsonl")
    pairs = [
        {"prompt": row["prompt"], "chosen": said(f"It is {row['answer']}."), "rejected": said("It is blue.")}
        for row in sums()[:4]
    ]
    write_jsonl(pairs, folder / "pairs.jsonl")
    questions = [{"question": row["prompt"][-1]["content"], "answer": row["answer"]} for row in sums()[:6]]
    for name, part in (("qa.parquet", questions[:4]), ("qa-target.parquet", questions[4:])):
        pq.write_table(pa.Table.from_pylist(part), folder / name)
    (folder / "units.py").write_text(UNITS)
    (folder / "bucket").mkdir()
    pq.write_table(pa.Table.from_pylist(train), folder / "bucket" / "train.parquet")
    write_jsonl(target, folder / "bucket" / "validation.jsonl")
    for name, text in config_files().items():
        (folder / name).write_text(text)
    (folder / "examples").symlink_to(EXAMPLES)
    shutil.copy(EXAMPLES / "custom_verifier.py", folder)  # `alphatoken pair` looks for it where it runs


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_earlier_runs(folder: Path) -> None:
    """`runs/scored`, with a row in quarantine, and `runs/masked`: of pages that begin after them."""
    with (folder / "train.jsonl").open("a") as file:
        file.write("{this is no JSON\n")
    score = "alphatoken score --model M --data train.jsonl --validation target.jsonl --output runs/scored"
    for command in (score, "alphatoken mask --input runs/scored --output runs/masked"):
        run_line(command)


def run_session(blocks: list[tuple[str, str]]) -> dict:
    """Everything that a page shows, in its order, in the working folder. Returns what its Python has made."""
    names: dict = {}
    for language, body in blocks:
        if language == "python":
            exec(compile(body, "<page>", "exec"), names)
        elif language == "json":
            json.loads(body)
        elif language in SHELL:
            for line in lines(body):
                if not reason_not_to_run(line):
                    run_line(line)
    return names


def run_line(line: str) -> str:
    """Runs one command and returns what it printed; AssertionError where it fails.

    Commands of ours and examples run in this process, with one Ray for all. Of `ray job submit` what follows `--` does.
    """
    for given, here in PLACEHOLDERS.items():
        line = line.replace(given, here)
    words = shlex.split(line, comments=True)
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    to_file = Path(words[-1]) if len(words) > 2 and words[-2] == ">" else None
    arguments = words[:-2] if to_file else words
    if arguments[0] == "alphatoken":
        shown = run_command(arguments[1:], line)
    elif arguments[0] == "python" and (job := JOB.fullmatch(arguments[1])):
        shown = run_command([job[1], *arguments[2:]], line)
    elif arguments[0] == "python" and arguments[1].startswith("examples/"):
        shown = run_example(arguments[1:])
    else:
        return run_in_shell(line)
    if to_file:
        to_file.write_text(shown)
    return shown


def run_command(argv: list[str], line: str) -> str:
    # --debug: a failure shows its traceback among what pytest has captured.
    more = [*SHORTER.get(argv[0], []), "--debug"] if argv[0] in main.COMMANDS else []
    more += SHORTER["--generate"] if "--generate" in argv else []
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = main.main([*argv, *more])
    assert code == 0, f"exit code {code}: {line}"
    return shown.getvalue()


def run_example(argv: list[str]) -> str:
    """As `python examples/x.py` runs it, its folder first on the path."""
    path, here = Path(argv[0]), Path.cwd()
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [str(path.parent.absolute()), *sys.path]),
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.chdir(here),  # comes back where the example goes elsewhere
    ):
        runpy.run_path(str(path), run_name="__main__")
    return shown.getvalue()


def run_in_shell(line: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(Path.cwd())}
    done = subprocess.run(["bash", "-euc", line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {line}\n{done.stdout}{done.stderr}"
    return done.stdout
