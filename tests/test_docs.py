"""The documentation builds, and what it shows works.

Commands in README.md, docs/ and examples/ are parsed here: the command has to exist, and its options have to make its
configuration, by the command line's own parser. test_docs_commands.py runs them.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from docs_commands import (
    DOCS,
    EXAMPLES,
    FENCE,
    INLINE,
    PAGES,
    ROOT,
    SCRIPTS,
    SHELL_SCRIPTS,
    commands,
    config_files,
    shown_commands,
)

from alphatoken import schema
from alphatoken.columns import CARRIED_OVER
from alphatoken.export_formats import STACKS
from jobs import cli, main

CONFIG_FILES = config_files()
CONFIG_FILES["runs/scored/manifest.json"] = CONFIG_FILES["run.yaml"]  # a run's manifest has its settings
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
# In running text, options that are not of our commands: `./start`, pip, ray, benchmarks.
FOREIGN_OPTIONS = {
    "full", "no-deps", "working-dir", "batch-size", "rules", "tasks", "threads", "seeds", "only", "layers",
    "again",
}  # fmt: skip


def parse(argv: list[str]) -> int:
    """The exit code of a command that does everything but its work."""
    run = cli.run

    def without_work(config_class, work, arguments=None, *, show=None, prog=None):
        return run(config_class, lambda config: None, arguments, prog=prog)

    with mock.patch.object(cli, "run", without_work), mock.patch.object(cli, "dry_run", lambda config: {}):
        return main.main(argv)


def parameters() -> list:
    return [
        pytest.param(argv, id=f"{path.relative_to(ROOT)}: {' '.join(argv)[:60]}") for path, argv in shown_commands()
    ]


@pytest.mark.parametrize("argv", parameters())
def test_commands_parse(argv, tmp_path, monkeypatch, capsys):
    for name, text in CONFIG_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
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


def config_classes() -> dict[str, type]:
    """The class that each command's options are made from."""
    found: dict[str, type] = {}
    for name in main.COMMANDS:
        with mock.patch.object(cli, "run", lambda kind, *_, name=name, **__: found.update({name: kind})):
            main.main([name])
    return found


def test_options_in_running_text_exist():
    fields = {field.replace("_", "-") for each in config_classes().values() for field in each.model_fields}
    known = fields | {f"no-{field}" for field in fields} | {"config", "json", "debug", "dry-run", "help", "version"}
    named = {
        option
        for page in PAGES
        for span in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        for option in OPTION.findall(span)
    }
    assert named - known <= FOREIGN_OPTIONS
    assert len(named) > 80


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
    for name, config_class in config_classes().items():
        section = re.search(rf'<section id="alphatoken-{name}">.*?</section>', text, re.DOTALL)
        assert section, f"alphatoken {name} is missing"
        options = set(re.findall(r"--([a-z-]+)", section[0]))
        assert {field.replace("_", "-") for field in config_class.model_fields} <= options


def test_the_columns_of_every_table_are_described(built):
    text = (built / "columns.html").read_text(encoding="utf-8")
    extra = (*schema.MASKED_EXTRA, *schema.MASKED_PAIRS_EXTRA, *schema.WINDOW_EXTRA)
    for table in (schema.RESPONSES, schema.PAIRS, schema.SCORED, schema.SCORED_PAIRS, schema.QUARANTINE, extra):
        for field in table:
            assert re.search(rf"<code[^>]*><span[^>]*>{field.name}</span></code>", text), field.name
    assert CARRIED_OVER not in text


def test_pictures_are_described_and_readable_on_dark_pages():
    for page in PAGES:
        for text, target in PICTURE.findall(page.read_text(encoding="utf-8")):
            assert len(text) > 20 and (page.parent / target).is_file(), f"{page}: {target}"
    for figure in (DOCS / "figures").glob("*.svg"):
        svg = ElementTree.parse(figure).getroot()
        drawn = [each for each in svg if each.tag.rpartition("}")[2] not in ("style", "defs", "desc")]
        assert drawn[0].tag.endswith("title") and drawn[0].text
        background = drawn[1].attrib  # under dark text, whatever the page's colour
        assert (
            background["fill"] == "#fff"
            and [background["width"], background["height"]] == svg.get("viewBox").split()[2:]
        )


def test_the_export_guide_has_every_stack():
    text = (DOCS / "guides" / "export.md").read_text(encoding="utf-8")
    assert [stack for stack in STACKS if f"`{stack}`" not in text] == []


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


def test_the_verifier_of_the_example_prefers_short_right_answers():
    verify = runpy.run_path(str(EXAMPLES / "custom_verifier.py"))["short_and_right"]
    assert verify("10", "10") > verify("It is 7 + 3 = 10", "10") > verify("It is 11", "10") == verify("ten", "10") == 0


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_examples_are_valid(path):
    subprocess.run(["bash", "-n", path], check=True)
