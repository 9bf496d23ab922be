"""Training in rounds: the whole flow. Read this first.

    files ──> encode ──> rows ───────────────────────────────────────────────┐
                                                                             v
    trainer: plain steps, then window after window: give weights away ──> wait ──> train on masked rows ──> ...
                                                          │                ^
                                                          v                │
    scoring actors:  (generate, pair) ──> direction at these weights ──> values of the window's rows ──> mask

Values go stale within a few optimizer steps, so each window of `--refresh-every` steps is valued with the weights of
its beginning; with `--overlap` with those of the window before, while the trainer works on that one. Weights travel
through Ray's object store. Masked windows and checkpoints stay on disk: the same command goes on with them.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from alphatoken import storage
from alphatoken.batching import split_evenly
from alphatoken.errors import UserError
from alphatoken.rounds_config import RoundsConfig
from alphatoken.schedule import ALL_PLAIN, Schedule, Window
from alphatoken.train_config import BY_LOSS, BY_VALUE
from pipelines.board import Board, ask
from pipelines.cluster import SLOTS, check_gpus, torch_threads, user_errors
from pipelines.live_trainer import Live
from pipelines.train import Progress, Training, begin, finish, finished_manifest, fit
from pipelines.window_files import check_pairs, finished_windows, warn_without_pairs, window_reasons, write_window
from pipelines.window_scorer import WindowScorer, combine

NEVER = 10**9  # a step that no run reaches
RETRIES = 5  # of a window whose weights or actors were lost

NO_RULE = "with --rule none every token is trained on and nothing is valued: --rule suspect drops what does harm"

logger = logging.getLogger(__name__)


def run_rounds(config: RoundsConfig, progress: Progress | None = None) -> dict:
    """Train in rounds, write the folder `config.output` and return its manifest. Goes on where it was cut off.

    Raises UserError and TrainingFailedError as `run_train` does.
    """
    check_room(config)
    training = begin(config, num_cpus=_logical_cpus(config))
    if training is None:
        return finished_manifest(config)
    schedule = make_schedule(training)
    warn_of_nothing(config, schedule)
    done = finished_windows(training.output, schedule)
    if config.generate:
        check_pairs(done, schedule)
    board = Board.remote(done)  # type: ignore[attr-defined]
    with user_errors(), valuing_windows(training, schedule, board, done) as stages:
        result = fit(training, progress, Live(board, schedule))
    windows = finished_windows(training.output, schedule)
    return finish(training, result, {"rounds": _summary(schedule, windows, stages, result.return_value["seconds"])})


def check_room(config: RoundsConfig) -> None:
    """UserError where workers and actors do not fit at the same time."""
    check_gpus("--num-actors", config.num_actors, config.gpus_per_actor, config.num_workers * config.gpus_per_worker)


def warn_of_nothing(config: RoundsConfig, schedule: Schedule) -> None:
    """Where no token will be valued: as the rule says, or since the run is that short and nobody asked for it."""
    if config.rule == "none":
        logger.warning(NO_RULE)
    elif schedule.is_all_plain and "plain_steps" not in config.model_fields_set:
        logger.warning(ALL_PLAIN, schedule.total_steps, config.plain_steps)


def make_schedule(training: Training) -> Schedule:
    """Which rows are trained on at which step, and valued in which window."""
    config = cast(RoundsConfig, training.config)
    return Schedule(
        num_rows=training.plan.num_rows,
        rows_per_forward=config.per_device_batch_size * config.num_workers,
        accumulation=config.gradient_accumulation,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        plain_steps=NEVER if config.rule == "none" else config.plain_steps,
        refresh_every=config.refresh_every,
        overlap=config.overlap,
        generates=bool(config.generate),
    )


@contextmanager
def valuing_windows(
    training: Training, schedule: Schedule, board: Any, done: dict[int, dict]
) -> Iterator[dict[str, float]]:
    """Values one window after the other in the background, while the trainer in the body asks for them.

    Yields the seconds spent in each stage.
    """
    seconds = dict.fromkeys(["weights", "read", "direction", "score", "mask"], 0.0)
    todo = [window for window in schedule.windows if window.start not in done]
    if not todo:
        yield seconds
        return
    actors = _start_actors(training)
    lengths = _row_lengths(training.plan.shards)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            for window in todo:
                _with_retries(_value_window, training, schedule, window, board, actors, lengths, seconds)
        except BaseException as error:  # the trainer must not wait for ever; raised again below
            failure.append(error)
            known = isinstance(error, UserError)  # the trainer need not try again
            ask(board.fail.remote(error if known else RuntimeError(f"valuing a window failed: {error}")))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield seconds
    except Exception:
        if failure:
            raise failure[0] from None
        raise
    finally:
        for actor in actors:
            ray.kill(actor)


def _value_window(
    training: Training,
    schedule: Schedule,
    window: Window,
    board: Any,
    actors: list,
    lengths: np.ndarray,
    seconds: dict[str, float],
) -> None:
    """Weights -> (pairs) -> direction -> values -> masks, for the rows of one window."""
    with _timed(seconds, "weights"):
        step, [snapshot] = ask(board.weights.remote(window.weights_step))
    try:
        with _timed(seconds, "read"):  # and generate and pair, where asked
            rows, _ = schedule.rows_of(window)
            parts = [rows[part] for part in split_evenly(lengths[rows], len(actors))]
            busy = [(actor, part) for actor, part in zip(actors, parts, strict=True) if len(part)]
            read = [actor.read.options(num_returns=2).remote(snapshot, part) for actor, part in busy]
            tables, refused = _wait([table for table, _ in read]), [aside for _, aside in read]
        known: list[ray.ObjectRef] = []
        if not schedule.is_plain(window):
            with _timed(seconds, "direction"):
                direction, drift, known = _measures(cast(RoundsConfig, training.config), actors, snapshot)
            with _timed(seconds, "score"):
                pairs = zip(busy, tables, strict=True)
                tables = _wait([actor.score.remote(snapshot, direction, drift, table) for (actor, _), table in pairs])
        with _timed(seconds, "mask"):
            config, output = cast(RoundsConfig, training.config), training.output
            summary = ask(write_window.remote(config, schedule, window, step, output, tables, refused, known))
    except RayError as error:
        if isinstance(_root(error), ObjectLostError):
            ask(board.forget.remote(step))  # the trainer that owned them has died; its successor gives new ones
        raise
    if config.generate:
        warn_without_pairs(window, summary)
        check_pairs(finished_windows(output, schedule), schedule)
    ask(board.finish.remote(window.start, summary))


def _measures(config: RoundsConfig, actors: list, snapshot: Any) -> tuple[Any, Any, list]:
    """(direction, drift, losses of the validation rows) at the snapshot, as far as the rule asks for them."""
    direction = drift = None
    known = [actor.losses.remote(snapshot) for actor in actors] if config.rule in BY_LOSS else []
    if config.rule in BY_VALUE:
        gradients = [actor.gradient.remote(snapshot) for actor in actors]
        drift = actors[0].drift.remote(snapshot)
        direction, drift = combine.options(num_returns=2).remote(gradients, snapshot, drift)
    _wait([*known, *([] if direction is None else [direction])])
    return direction, drift, known


def _wait(references: list) -> list:
    """The same, once they are there; what went wrong shows where they are used."""
    ray.wait(references, num_returns=len(references), fetch_local=False)
    return references


def _with_retries(work: Callable[..., None], *args: Any) -> None:
    """Again where Ray lost an actor, a worker or what they held; an error of our own code would only repeat itself."""
    for left in reversed(range(RETRIES + 1)):
        try:
            return work(*args)
        except RayError as error:
            if not left or not isinstance(_root(error), RayError) or isinstance(_root(error), RayTaskError):
                raise
            logger.warning("valuing a window failed (%s), trying again", type(error).__name__)
            time.sleep(1.0)


def _root(error: BaseException) -> BaseException:
    """What went wrong in the first place, below the errors of tasks that waited for it."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _start_actors(training: Training) -> list:
    config = cast(RoundsConfig, training.config)
    sharing = config.num_actors + (config.num_workers if config.overlap else 0)
    options = {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}
    threads = torch_threads(sharing, config.cpus_per_actor)
    count = config.num_actors
    actors = [
        cast(Any, WindowScorer)
        .options(**options)
        .remote(config, training.plan.shards, part, count, threads, training.output, os.getcwd())
        for part in range(count)
    ]
    ray.get([actor.ready.remote() for actor in actors])  # what is wrong with them is known before training starts
    return actors


def _row_lengths(shards: list[str]) -> np.ndarray:
    """Tokens of every row (pair, prompt): the actors get equal shares of work."""
    names = storage.read_schema(shards[0]).names
    columns = [name for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in names]
    tables = [storage.read_table(shard, columns) for shard in shards]
    return sum(np.concatenate([pc.list_value_length(table[name]) for table in tables]) for name in columns)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[stage] += time.monotonic() - started


def _logical_cpus(config: RoundsConfig) -> int:
    """What a private Ray needs: all workers and actors at once, and slots for tasks."""
    return int(config.num_workers * config.cpus_per_worker + config.num_actors * config.cpus_per_actor) + SLOTS


def _summary(schedule: Schedule, windows: dict[int, dict], stages: dict[str, float], trainer: dict) -> dict:
    """What the manifest says of the rounds."""
    found = list(windows.values())
    valued = [windows[window.start]["counts"] for window in schedule.windows if not schedule.is_plain(window)]
    seconds = stages | {f"trainer_{name}": value for name, value in trainer.items()}
    response = sum(window["counts"]["response_tokens"] for window in found)
    kept = sum(window["counts"]["kept_tokens"] for window in found)
    return {
        "windows": len(schedule.windows),
        "oldest_values": max((window["oldest_values"] for window in found), default=0),
        "rows_valued": sum(counts["rows_in"] - counts["rows_quarantined"] for counts in valued),
        "rows_in": sum(window["counts"]["rows_in"] for window in found),
        "rows_out": sum(window["counts"]["rows_out"] for window in found),
        "rows_quarantined": sum(window["counts"]["rows_quarantined"] for window in found),
        "rows_dropped_sequences": sum(window["counts"]["rows_dropped_sequences"] for window in found),
        "quarantine_reasons": window_reasons(windows),
        "kept_fraction": round(kept / response, 6) if response else 1.0,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
