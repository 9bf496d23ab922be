"""Imports run one way: jobs -> pipelines -> alphatoken; and no file hides a module that others import."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "alphatoken": {"ray", "vllm", "trl", "pipelines", "jobs", "benchmarks", "tests"},
    "pipelines": {"jobs", "benchmarks", "tests"},
    "jobs": {"benchmarks", "tests"},
}
# `python jobs/x.py` puts jobs/ first on sys.path: a file there is found before these.
THIRD_PARTY = {"ray", "datasets", "torch", "transformers", "trl", "vllm", "peft", "accelerate", "numpy", "pyarrow"}
THIRD_PARTY |= {"fsspec", "pydantic", "yaml", "rich", "jinja2", "gguf", "safetensors"}
OURS = {"alphatoken", "pipelines", "jobs"}


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, also inside functions; relative ones are resolved in `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{stem}.{alias.name}" if stem else alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((name.value, node.lineno) for name in node.args[:1] if isinstance(name, ast.Constant))


def breaches(source: str, package: tuple[str, ...]) -> list[str]:
    forbidden = FORBIDDEN[package[0]]
    return [f"line {line}: {name}" for name, line in imported(source, package) if name.split(".")[0] in forbidden]


@pytest.mark.parametrize("path", modules(*FORBIDDEN), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    found = breaches(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.parts)
    assert not found, f"{path.relative_to(ROOT)} must not import these: {found}"


@pytest.mark.parametrize(
    ("source", "package", "count"),
    [
        ("import ray", "alphatoken", 1),
        ("def f():\n    from ray.data import Dataset", "alphatoken", 1),
        ("import importlib\nimportlib.import_module('vllm')", "alphatoken", 1),
        ("from .. import pipelines", "alphatoken/sub", 0),  # alphatoken.pipelines, another module
        ("from ... import jobs", "alphatoken/sub", 1),
        ("from jobs.score import main", "pipelines", 1),
        ("import ray, trl, alphatoken", "pipelines", 0),
        ("import rayon_like, torch", "alphatoken", 0),
    ],
)
def test_the_check_finds_breaches(source: str, package: str, count: int) -> None:
    assert len(breaches(source, tuple(package.split("/")))) == count


def test_no_job_hides_a_module() -> None:
    taken = set(sys.stdlib_module_names) | THIRD_PARTY | OURS
    hiding = [path.name for path in modules("jobs") if path.stem in taken]
    hiding += [path.name for path in (ROOT / "jobs").iterdir() if path.is_dir() and path.name in taken]
    assert not hiding, f"jobs/ hides modules of these names: {hiding}"


def test_there_is_no_utils_module() -> None:
    folders = ("alphatoken", "pipelines", "jobs", "benchmarks", "tests")
    assert not [str(path) for path in modules(*folders) if path.stem in ("utils", "util")]


def test_library_does_not_print() -> None:
    for path in modules("alphatoken", "pipelines"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not prints, f"{path.relative_to(ROOT)} prints in lines {prints}: log instead"
