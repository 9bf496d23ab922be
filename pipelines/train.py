"""MASKED folder in, checkpoint out: SFT or DPO on kept tokens, on Ray Train workers.

    OUT/run.json           what run this is; another one is refused
    OUT/checkpoints/run/   Ray Train's: checkpoints and their list; a run that was cut off goes on at the last one
    OUT/metrics.jsonl      a line per log or evaluation
    OUT/evaluation.parquet held-out rows, encoded
    OUT/encoded            in-run and rounds: the training files, encoded
    OUT/model, OUT/adapter the result: transformers folders
    OUT/manifest.json      written last

What can be known to be wrong is an error before a worker starts (pipelines/train_checks.py).
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
from fsspec.implementations.local import LocalFileSystem

from alphatoken import manifest as manifests
from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.run_folder import RunFolder
from alphatoken.train_config import TrainConfig
from pipelines.cluster import connect, torch_threads
from pipelines.live_trainer import Live
from pipelines.progress import repeating
from pipelines.train_checks import TrainPlan, check_resources, check_train, with_encoded_rows, write_evaluation
from pipelines.train_export import export_model
from pipelines.train_worker import train_worker

# Settings that change where and how it is shown, but not what comes out.
NOT_IDENTITY = {
    "output", "overwrite", "resume", "report_to", "gpus_per_worker", "cpus_per_worker", "max_failures",
    "gradient_checkpointing", "num_actors", "gpus_per_actor", "cpus_per_actor", "batch_tokens",
}  # fmt: skip
TRAIN_PACKAGES = ("trl", "peft", "accelerate")
RUN_NAME = "run"
KEPT_CHECKPOINTS = 2

Progress = Callable[[dict], None]  # called with every line of metrics.jsonl

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """A run that is ready to start: checked, its folder open, its rows encoded, Ray running."""

    config: TrainConfig
    plan: TrainPlan
    output: str  # absolute
    evaluation: list[str]  # shards of held-out rows
    started: float  # time.monotonic


def run_train(config: TrainConfig, progress: Progress | None = None) -> dict:
    """Train, write the folder `config.output` and return its manifest. Goes on where the same run was cut off.

    Raises:
        UserError: whatever can be known to be wrong before training; masks that do not reach the batches.
        ray.train.TrainingFailedError: workers failed more often than `config.max_failures`.
    """
    training = begin(config)
    if training is None:
        return finished_manifest(config)
    return finish(training, fit(training, progress))


def begin(config: TrainConfig, num_cpus: int | None = None) -> Training | None:
    """Everything before the first step; None if the run has finished. `num_cpus`: see `cluster.connect`."""
    started = time.monotonic()
    plan = check_train(config)
    folder = _open(config, plan)
    if folder is None:
        return None
    evaluation = write_evaluation(config, plan, storage.join(folder.uri, "evaluation.parquet"))
    connect(num_cpus)
    check_resources(config, ray.cluster_resources())
    if config.trains_on_files:
        plan = with_encoded_rows(config, plan, storage.join(folder.uri, "encoded"))
    return Training(config, plan, folder.uri, evaluation, started)


def finish(training: Training, result: ray.train.Result, extra: dict | None = None) -> dict:
    """Export the model and write the manifest, with `extra` in it; returns it."""
    config = training.config
    best = _best(config, result)
    ray.get(export_model.remote(best, config, training.output))
    manifest = _manifest(training, result.return_value, best.path, extra or {})
    storage.write_json(manifest, storage.join(training.output, "manifest.json"))
    return manifest


def finished_manifest(config: TrainConfig) -> dict:
    """Of a run that had finished before."""
    output = storage.absolute(config.output)
    logger.info("%s is already finished", output)
    return RunFolder(output).manifest()


def _open(config: TrainConfig, plan: TrainPlan) -> RunFolder | None:
    """The output folder, ready for this run; None if the run has finished."""
    folder = RunFolder(storage.absolute(config.output))
    identity = train_identity(config, plan)
    if config.overwrite and not config.resume:
        folder.clear()
    state = folder.open(identity, config.overwrite)
    check_resume(config, folder, state)
    return None if state == "finished" else folder


def train_identity(config: TrainConfig, plan: TrainPlan) -> dict:
    """What the output folder keeps of the run, to know it again."""
    settings = config.model_dump(mode="json", exclude=NOT_IDENTITY) | {"data": plan.data}
    return {"stage": config.stage, "config": settings, "fingerprints": plan.fingerprints}


def check_resume(config: TrainConfig, folder: RunFolder, state: str) -> None:
    """UserError where the run was cut off and is not to go on."""
    if state == "resume" and not config.resume and not config.overwrite:
        raise UserError(f"{folder.uri} holds this run, cut off; --resume goes on with it, --overwrite starts again")


def fit(training: Training, progress: Progress | None = None, live: Live | None = None) -> ray.train.Result:
    """Train on Ray Train workers; `live` connects them to the actors that value their data."""
    config, plan = training.config, training.plan
    metrics = storage.join(training.output, "metrics.jsonl")
    settings = {
        "config": config,
        "shards": plan.shards,
        "columns": plan.columns,
        "stored_reference": plan.stored_reference,
        "evaluation_shards": training.evaluation,
        "metrics": metrics,
        "threads": torch_threads(config.num_workers, config.cpus_per_worker),
        "live": live,
    }
    resources = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    trainer = _Trainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=_run_config(config, storage.join(training.output, "checkpoints")),
    )
    with _following(metrics, progress):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {}).values()
            known = next((failure for failure in failures if isinstance(failure, UserError)), None)
            if known:
                raise known from None
            raise
    if "user_error" in result.return_value:
        raise UserError(result.return_value["user_error"])
    return result


class _Trainer(ray.train.torch.TorchTrainer):
    """Without some of Ray Train's callbacks.

    One has workers leave the folder that relative paths, such as `--model base`, are meant from. Another is an actor
    that frees resources after a killed driver: a private Ray dies with its driver, and has no dashboard, which the
    actor polls, with a warning every second.
    """

    def _create_default_callbacks(self) -> list:
        left_out = {"WorkingDirectorySetupCallback"}
        if not os.environ.get("RAY_ADDRESS"):
            left_out.add("PlacementGroupCleanerCallback")
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in left_out]


def _run_config(config: TrainConfig, checkpoints: str) -> ray.train.RunConfig:
    """Where checkpoints go. The same name and place again makes Ray Train go on at the last checkpoint."""
    fs, path = storage.filesystem(checkpoints)
    local = isinstance(fs, LocalFileSystem)
    score = (
        {"checkpoint_score_attribute": "eval_loss", "checkpoint_score_order": "min"} if config.early_stopping else {}
    )
    return ray.train.RunConfig(
        name=RUN_NAME,
        storage_path=path,
        storage_filesystem=None if local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
        failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS, **score),
        logging_config=ray.train.LoggingConfig(log_level="WARNING"),
    )


def _best(config: TrainConfig, result: ray.train.Result) -> ray.train.Checkpoint:
    """The last checkpoint, or with early stopping the one with the lowest held-out loss."""
    scored = [(found["eval_loss"], checkpoint) for checkpoint, found in result.best_checkpoints if "eval_loss" in found]
    if config.early_stopping and scored:
        return min(scored, key=lambda pair: pair[0])[1]
    return result.checkpoint


@contextmanager
def _following(uri: str, progress: Progress | None) -> Iterator[None]:
    """Calls `progress` with each new line of a metrics file while the body runs."""
    if progress is None:
        yield
        return
    shown = 0

    def show_new() -> None:
        nonlocal shown
        lines = read_metrics(uri)
        shown = min(shown, len(lines))  # after a killed worker the file goes back to the last checkpoint
        for line in lines[shown:]:
            progress(line)
        shown = len(lines)

    try:
        with repeating(show_new, 1.0):
            yield
    finally:
        show_new()


def read_metrics(uri: str) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where it is not there yet."""
    if not storage.exists(uri):
        return []
    return [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]


def _manifest(training: Training, outcome: dict, checkpoint: str, extra: dict) -> dict:
    config, plan = training.config, training.plan
    history = outcome["history"]
    last = {name: value for entry in history for name, value in entry.items()}
    if last.get("train_loss", 0.0) is None:
        logger.warning("the training loss is not finite: the run diverged; try a lower --learning-rate")
    names = ("train_loss", "eval_loss", "epoch", "skipped_batches")
    counts = {"rows": plan.num_rows, "steps": outcome["steps"]}
    counts |= {name: last[name] for name in names if name in last}
    scored_with = plan.fingerprints.get("scored_model")
    trained = outcome["model_fingerprint"]
    if scored_with and trained and scored_with != trained:
        logger.warning(
            "the values behind these masks are of another checkpoint than %s: they may be stale, see the README",
            config.model,
        )
    versions = {name: metadata.version(name) for name in TRAIN_PACKAGES}
    return manifests.build_manifest(
        config.stage,
        config.model_dump(mode="json"),
        counts,
        plan.fingerprints | {"model": trained},
        time.monotonic() - training.started,
        extra={"checkpoint": checkpoint, "stored_reference": plan.stored_reference, "train_versions": versions} | extra,
    )
