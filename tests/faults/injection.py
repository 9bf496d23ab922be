"""Faults inside scoring actors: what a `Faults` says happens in every actor of a run.

A run finds its faults beside its output, in OUTPUT.faults.json: actors are started by Ray in processes of their own.
"""

import errno
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from alphatoken import retries, scoring, storage
from pipelines.scorer import PairScorer, ScorePlan, Scorer


@dataclass(frozen=True)
class Faults:
    """By row ids: of a pair, both branches."""

    seed: int = 0
    deadly: tuple[int, ...] = ()  # the process that computes one of these rows dies
    death: int = signal.SIGKILL
    memory: tuple[int, ...] = ()  # no memory for a batch with one of these rows, unless it is alone
    no_memory: tuple[int, ...] = ()  # nor alone
    storage: float = 0.0  # probability that a write fails once with EIO
    quota: int | None = None  # bytes that a process can write until its disk is full
    slow: float = 0.0  # seconds more for every batch, so that there is a time to be cut off in
    pairs: bool = False  # whether the rows are pairs


def faults_file(output: str) -> Path:
    return Path(output + ".faults.json")


def start(output: str) -> None:
    """In an actor: patch what fails. Without a file nothing does."""
    path = faults_file(output)
    if not path.exists():
        return
    faults = Faults(**json.loads(path.read_text()))
    _fail_in_batches(faults)
    _fail_in_storage(faults)


def _fail_in_batches(faults: Faults) -> None:
    make_batch = scoring.make_batch

    def failing(ids, masks, numbers):
        rows = {number // 2 for number in numbers} if faults.pairs else set(numbers)
        time.sleep(faults.slow)
        if len(ids[0]) <= 2:  # the probe of the set-up
            return make_batch(ids, masks, numbers)
        if rows & set(faults.deadly):
            os.kill(os.getpid(), faults.death)
            signal.pause()
        if rows & set(faults.no_memory) or (len(numbers) > 1 and rows & set(faults.memory)):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return make_batch(ids, masks, numbers)

    scoring.make_batch = failing


def _fail_in_storage(faults: Faults) -> None:
    write_and_rename = storage._write_and_rename
    draw, state = random.Random(faults.seed), {"failed": False, "written": 0}

    def failing(fs, data, temporary, path):
        if not state["failed"] and draw.random() < faults.storage:
            state["failed"] = True  # the next attempt succeeds
            Path(temporary).write_bytes(bytes(data)[: len(data) // 2])
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        state["failed"] = False
        state["written"] += len(data)
        if faults.quota is not None and state["written"] > faults.quota:
            Path(temporary).write_bytes(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_and_rename(fs, data, temporary, path)

    storage._write_and_rename = failing
    retries.FIRST_WAIT = 0.01


class FaultyScorer(Scorer):
    def __init__(self, plan: ScorePlan, threads: int) -> None:
        start(plan.output)
        super().__init__(plan, threads)


class FaultyPairScorer(PairScorer):
    def __init__(self, plan: ScorePlan, threads: int) -> None:
        start(plan.output)
        super().__init__(plan, threads)


def tell(output: str, faults: Faults | None) -> None:
    """Actors of runs into `output` that begin from now on have these faults."""
    path = faults_file(output)
    if faults is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(asdict(faults)))


@contextmanager
def faulty_actors() -> Iterator[None]:
    """Score runs of this process have actors that ask for their faults."""
    with mock.patch("pipelines.score.Scorer", FaultyScorer), mock.patch("pipelines.score.PairScorer", FaultyPairScorer):
        yield
