"""The lock file, pyproject.toml, ./start and .ci/run agree."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from alphatoken.embedded import DISTRIBUTION

ROOT = Path(__file__).parent.parent
# Pinned with its hash for the one test that needs it: transformers and TRL import it wherever it is installed.
ELSEWHERE = {"torchao": "tests/stacks/torchao.txt"}
NOT_LOCKED = {"vllm", *ELSEWHERE}  # vllm: GPU machines only
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+) \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(path: str) -> dict[str, str]:
    """Name -> pinned version; every line is a comment, a pin or a hash, and no pin is without a hash."""
    found: dict[str, int] = {}
    versions: dict[str, str] = {}
    name = ""
    for line in read(path).splitlines():
        if pin := PIN.fullmatch(line):
            name = canonicalize_name(pin[1])
            assert name not in versions, f"{name} stands there twice"
            versions[name], found[name] = pin[2], 0
        elif HASH.fullmatch(line):
            found[name] += 1
        else:
            assert line.startswith("#"), f"not pinned exactly, or with a local version: {line}"
    assert all(found.values()), [name for name, hashes in found.items() if not hashes]
    return versions


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return pins("requirements/cpu.lock")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))


def requirements(project: dict) -> list[Requirement]:
    table = project["project"]
    extras = [text for texts in table["optional-dependencies"].values() for text in texts]
    build = project["build-system"]["requires"]
    return [Requirement(text) for text in [*table["dependencies"], *extras, *build]]


def test_lock_file_holds_what_the_package_asks_for(lock: dict[str, str], project: dict) -> None:
    for requirement in requirements(project):
        name = canonicalize_name(requirement.name)
        if name not in NOT_LOCKED:
            assert name in lock, f"{name} is missing from the lock file"
            assert requirement.specifier.contains(lock[name]), f"{requirement} refuses the pinned {lock[name]}"


def test_what_is_pinned_elsewhere_is_what_the_package_asks_for(project: dict) -> None:
    for requirement in requirements(project):
        if requirement.name in ELSEWHERE:
            assert requirement.specifier.contains(pins(ELSEWHERE[requirement.name])[requirement.name])


def test_every_package_for_gpus_has_its_hash(lock: dict[str, str]) -> None:
    gpu = pins("requirements/gpu.lock")
    differ = {name for name in gpu.keys() & lock.keys() if gpu[name] != lock[name]}
    assert differ == {"apache-tvm-ffi"}, "cpu.lock and gpu.lock were not made together"


def test_the_small_torch_is_the_locked_one(lock: dict[str, str]) -> None:
    (line,) = [line for line in read("requirements/torch-cpu.lock").splitlines() if not line.startswith("#")]
    assert re.fullmatch(rf"torch=={re.escape(lock['torch'])}\+cpu --hash=sha256:[0-9a-f]{{64}}", line)


def test_embedded_model_is_the_locked_one(lock: dict[str, str]) -> None:
    assert version(DISTRIBUTION) == lock[DISTRIBUTION]


def test_every_lower_bound_is_a_lower_bound(project: dict) -> None:
    for text in project["project"]["dependencies"]:
        specifier: SpecifierSet = Requirement(text).specifier
        assert all(part.operator in (">=", "==") for part in specifier), f"{text} shuts out later versions"


def test_package_data_is_there(project: dict) -> None:
    for pattern in project["tool"]["setuptools"]["package-data"]["alphatoken"]:
        assert list((ROOT / "alphatoken").glob(pattern)), f"nothing matches alphatoken/{pattern}"


@pytest.mark.parametrize("script", ["start", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert read(script).startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_start_and_ci_run_the_same_tests() -> None:
    assert re.search(r'^exec \./start test( "\$@")?$', read(".ci/run"), re.MULTILINE)
    assert re.search(r'^ +exec "\$python" -m pytest -q -n 2 --dist loadfile "\$@"$', read("start"), re.MULTILINE)
    assert read("start").count("pytest -q") == 1


@pytest.mark.parametrize("arguments", [[], ["shell"]])
def test_start_explains_itself(arguments: list[str]) -> None:
    done = subprocess.run([ROOT / "start", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "./start setup | demo" in done.stderr


@pytest.mark.parametrize("version", [(3, 11, 4), (3, 14, 0)])
def test_start_refuses_a_python_that_its_packages_are_not_for(tmp_path: Path, version: tuple[int, ...]) -> None:
    (tmp_path / "start").write_text(read("start"))
    other = tmp_path / "python"  # this interpreter, which says that it is another
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n')
    other.chmod(0o755)
    command = ["bash", tmp_path / "start", "setup"]
    environment = os.environ | {"PYTHON": str(other)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a Python 3.11.5 to 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()
