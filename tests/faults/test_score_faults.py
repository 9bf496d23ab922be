"""Score and mask with faults: every row once, or in quarantine with a reason; values and masks of the undisturbed run.

Each fault at random places, by seed. A short set runs by default, the rest with --full; `python -m tests.faults.soak`
goes on for as long as it is told.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alphatoken.errors import UserError
from alphatoken.scoring import NOT_FINITE
from jobs.cli import INTERRUPTED
from pipelines.cluster import actor_pool
from pipelines.poison import DIED
from tests.faults.harness import OVERFLOWING, ROOT, ActorKiller, commits, cut_off
from tests.faults.injection import Faults, tell

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
SLOWLY = Faults(slow=0.1)
MORE = [pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2, 3)]  # seed 0 by default


@pytest.fixture(params=["rows", pytest.param("pairs", marks=pytest.mark.full)])
def either(request):
    """A bench of each kind of data."""
    return request.getfixturevalue("bench" if request.param == "rows" else "pair_bench")


@pytest.fixture(params=[pytest.param(False, id="cpus", marks=pytest.mark.full), pytest.param(True, id="gpus")])
def actors(request, monkeypatch):
    """As they are on CPUs or on GPUs, where one computes a block while it writes another. A name for the output."""
    monkeypatch.setattr("pipelines.score.actor_pool", lambda low, high, ahead: actor_pool(low, high, request.param))
    return "gpus" if request.param else "cpus"


def test_rows_that_overflow_are_in_quarantine_and_nothing_in_the_output_is_not_finite(either):
    lines = Path(either.data).read_text().splitlines()
    overflowing = {i for i, line in enumerate(lines) if OVERFLOWING in line and not line.startswith("{broken")}
    reasons = either.expected.reasons
    assert overflowing and {row for row, reason in reasons.items() if reason == NOT_FINITE} == overflowing
    assert set(reasons) - overflowing == {i for i, line in enumerate(lines) if line.startswith("{broken")}
    assert sorted([*either.expected.rows, *either.expected.aside]) == list(range(either.rows))


@pytest.mark.parametrize("seed", [0, *MORE])
def test_killed_actors_storage_that_fails_batches_too_large_and_a_row_that_kills(either, actors, seed):
    draw = random.Random(seed)
    deadly, no_memory, *memory = either.good_rows(draw, 6)
    faults = Faults(seed, (deadly,), memory=memory, no_memory=(no_memory,), storage=0.2, slow=0.02, pairs=either.pairs)
    config = either.config(f"several-{actors}-{seed}")
    killer = ActorKiller(draw, draw.sample(range(1, 6), 1))
    either.score(config, faults, killer)
    assert killer.killed
    assert not either.findings(config, bad=(deadly, no_memory))
    reasons = either.left(config).reasons
    assert reasons[deadly].startswith(DIED) and "out of memory with this row alone" in reasons[no_memory]


@pytest.mark.full
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_kills_its_process(either, actors, seed, death):
    deadly = either.good_rows(random.Random(seed), 1)
    config = either.config(f"deadly-{actors}-{seed}-{death}")
    either.score(config, Faults(seed, deadly, death, pairs=either.pairs))
    assert not either.findings(config, bad=deadly)
    assert either.left(config).reasons[deadly[0]].startswith(DIED)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_several_rows_that_kill_and_actors_that_are_killed(either, actors, seed):
    draw = random.Random(seed)
    deadly = either.good_rows(draw, 3)
    config = either.config(f"several-deadly-{actors}-{seed}", num_actors="2")
    either.score(config, Faults(seed, deadly, slow=0.02, pairs=either.pairs), ActorKiller(draw, [1, 3]))
    assert not either.findings(config, bad=deadly)
    assert set(either.left(config).reasons) == set(either.expected.reasons) | set(deadly)


@pytest.mark.full
def test_where_every_row_kills_the_run_ends_and_says_so(bench):
    config = bench.config("all-deadly")
    with pytest.raises(UserError, match="a wrong set-up"):
        bench.score(config, Faults(deadly=tuple(range(bench.rows))))


@pytest.mark.parametrize("seed", [0, *MORE])
def test_a_full_disk_ends_the_run_and_another_goes_on(either, seed):
    config = either.config(f"full-{seed}")
    with pytest.raises(UserError, match="no space is left there .* run the same command again: it resumes"):
        either.score(config, Faults(seed, quota=random.Random(seed).randint(10_000, 40_000)))
    assert commits(config) and not Path(config.output, "manifest.json").exists()
    either.score(config)
    assert not either.findings(config)


@pytest.mark.timeout(600)  # starts Ray several times
@pytest.mark.parametrize("seed", [0, *MORE])
def test_ctrl_c_and_a_killed_driver(bench, seed):
    """Both in one run, which the third command finishes; what was committed is kept, not done again."""
    draw = random.Random(seed)
    config = bench.config(f"cut-off-{seed}")
    tell(config.output, SLOWLY)
    assert cut_off(config, signal.SIGINT, draw.randint(1, 3)) == INTERRUPTED
    assert cut_off(config, signal.SIGKILL, draw.randint(1, 3)) == -signal.SIGKILL
    assert not Path(config.output, "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path(config.output, "data").glob("train-*.parquet")
            if Path(config.output, "commits", f"{path.stem.removeprefix('train-')}.json").exists()}  # fmt: skip
    assert kept
    bench.score(config)
    assert not bench.findings(config)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.full
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_mask_cut_off(bench, kind):
    config = bench.config(f"mask-{kind}")
    bench.score(config)
    cut_off(bench.mask_config(config), kind, random.Random(kind).randint(1, 4))
    assert not bench.findings(config)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_a_worker_node_that_goes_away(bench, seed):
    """Two nodes on this machine, one of them killed while it scores."""
    config = bench.config(f"nodes-{seed}", num_actors="2")
    tell(config.output, SLOWLY)
    path = Path(f"{config.output}.config.json")
    path.write_text(config.model_dump_json(exclude_defaults=True))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.two_nodes", str(path), str(random.Random(seed).randint(1, 4))], cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["used_cpus"] >= 1
    assert not bench.findings(config)
