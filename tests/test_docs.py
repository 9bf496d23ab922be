"""The documentation builds, and what it shows works.

Commands in README.md, docs/ and examples/ are parsed, not run: the command has to exist, and its options have to make
its configuration, by the command line's own parser. The code of the library page and the examples that need no Ray run
on a tiny model; of the others `--help` runs.
"""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from alphatoken.export_formats import STACKS
from jobs import cli, main

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {"sh", "bash", "console"}
JOB = re.compile(r"jobs/(\w+)\.py")
DOCSTRING_COMMAND = re.compile(r"^ {4}(alphatoken .+)$", re.MULTILINE)
CONFIG_FILE = re.compile(r"# (\S+\.yaml)\n")
# Files with settings that a command in another block reads.
CONFIG_FILES = {
    found[1]: body
    for page in PAGES
    for language, body in FENCE.findall(page.read_text(encoding="utf-8"))
    if language == "yaml" and (found := CONFIG_FILE.match(body))
}


def blocks(text: str, languages: set[str]) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of every `alphatoken ...`, and of every `python jobs/NAME.py ...`, in a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(lexer.punctuation_chars):
                words.append(word)
                continue
            places = [i for i, each in enumerate(words) if JOB.fullmatch(each)]
            if words[:1] == ["alphatoken"]:
                yield words[1:]
            elif places:
                yield [JOB.fullmatch(words[places[0]])[1], *words[places[0] + 1 :]]
            words = []


def shown_commands() -> list:
    texts = {page: "\n".join(blocks(page.read_text(encoding="utf-8"), SHELL)) for page in PAGES}
    texts |= {path: path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.sh"))}
    texts |= {path: "\n".join(DOCSTRING_COMMAND.findall(path.read_text(encoding="utf-8"))) for path in SCRIPTS}
    return [
        pytest.param(argv, id=f"{path.relative_to(ROOT)}: {' '.join(argv)[:60]}")
        for path, text in texts.items()
        for argv in commands(text)
    ]


def parse(argv: list[str]) -> int:
    """The exit code of a command that does everything but its work."""
    run = cli.run

    def without_work(config_class, work, arguments=None, *, show=None, prog=None):
        return run(config_class, lambda config: None, arguments, prog=prog)

    with mock.patch.object(cli, "run", without_work):
        return main.main(argv)


@pytest.mark.parametrize("argv", shown_commands())
def test_commands_parse(argv, tmp_path, monkeypatch, capsys):
    for name, text in CONFIG_FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert parse(argv) == 0, capsys.readouterr().err


def test_commands_are_found_and_wrong_ones_refused(capsys):
    script = "alphatoken mask --input a \\\n  --output b  # why\nx && alphatoken show c > d; python jobs/mask.py --json"
    assert list(commands(script)) == [["mask", "--input", "a", "--output", "b"], ["show", "c"], ["mask", "--json"]]
    assert len(shown_commands()) > 40
    assert parse(["mask", "--input", "a", "--output", "b", "--keep-fractoin", "1"]) == 2
    assert parse(["mask", "--input", "a", "--output", "b", "--keep-fraction", "2"]) == 2
    assert parse(["maks"]) == 2


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in main.COMMANDS if f"alphatoken {name}" not in text] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(output / "doctrees")]
    done = subprocess.run([*command, str(DOCS), str(output / "html")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "html"


def test_sphinx_has_no_warnings_and_pages_load_nothing_from_elsewhere(built):
    for page in DOCS.rglob("*.md"):
        html = (built / page.relative_to(DOCS).with_suffix(".html")).read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|iframe)[^>]+src=\"(https?:)?//|<link rel=\"stylesheet\"[^>]+//", html)
        assert "<!-- generated" not in html and "<!-- measured" not in html, f"{page} was not filled"


def test_the_reference_has_every_option(built):
    text = (built / "configuration.html").read_text(encoding="utf-8")
    for name in main.COMMANDS:
        seen: list = []
        with mock.patch.object(cli, "run", lambda config_class, *_, seen=seen, **__: seen.append(config_class)):
            main.main([name])
        section = re.search(rf'<section id="alphatoken-{name}">.*?</section>', text, re.DOTALL)
        assert section, f"alphatoken {name} is missing"
        options = set(re.findall(r"--([a-z-]+)", section[0]))
        assert {field.replace("_", "-") for field in seen[0].model_fields} <= options


def test_the_export_guide_has_every_stack():
    text = (DOCS / "guides" / "export.md").read_text(encoding="utf-8")
    assert [stack for stack in STACKS if f"`{stack}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page):
    for block in blocks(page.read_text(encoding="utf-8"), {"python"}):
        compile(block, str(page), "exec")


def test_the_library_page_runs(tiny_checkpoint):
    [code] = [block for block in blocks((DOCS / "library.md").read_text(encoding="utf-8"), {"python"})]
    assert code.count('"smollm2-135m-instruct"') == 1
    names: dict = {}
    exec(compile(code.replace("smollm2-135m-instruct", tiny_checkpoint), "library.md", "exec"), names)
    assert torch.isfinite(names["loss"].total) and names["loss"].count == names["keep"].sum() < len(names["keep"])
    assert next(names["scoring"].model.parameters()).grad is not None


def run_example(path: Path, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(path.parent))  # as `python examples/x.py` has it
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_examples_explain_themselves(path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_example(path, ["--help"], monkeypatch)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--model" in shown and f"examples/{path.name}" in shown


def test_the_library_example_runs(tiny_checkpoint, monkeypatch, capsys):
    run_example(EXAMPLES / "library.py", ["--model", tiny_checkpoint], monkeypatch)
    assert "mean loss of the" in capsys.readouterr().out


def test_the_baseline_example_runs(tiny_checkpoint, monkeypatch, capsys):
    run_example(EXAMPLES / "custom_baseline.py", ["--model", tiny_checkpoint, "--rows", "2"], monkeypatch)
    assert "rank correlation with exact values" in capsys.readouterr().out


def test_the_verifier_of_the_example_prefers_short_right_answers():
    verify = runpy.run_path(str(EXAMPLES / "custom_verifier.py"))["short_and_right"]
    assert verify("10", "10") > verify("It is 7 + 3 = 10", "10") > verify("It is 11", "10") == verify("ten", "10") == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_examples_are_valid(path):
    subprocess.run(["bash", "-n", path], check=True)
