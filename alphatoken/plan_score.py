"""A plan of a score run: its data, model, memory, operations, hours and price, and the command to start it with."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alphatoken.errors import UserError
from alphatoken.plan import DEVICES, Device, Work, actors_for, count_work, direction_flops, forward_flops
from alphatoken.plan_config import NO_VALIDATION, PlanConfig, command_line
from alphatoken.plan_data import Survey, check_data, sequence_encoder, survey_rows
from alphatoken.plan_memory import Memory, direction_memory
from alphatoken.plan_model import PlannedRun, read_run
from alphatoken.sources import ReadUnit, plan_units
from alphatoken.targets import validation_files

USABLE_MEMORY = 0.9  # of a device: the rest is for its context, fragments and what formulas leave out
SMALLEST_BATCH_TOKENS = 256
VALIDATION_ROWS = 256  # sorted by length at a time, when the direction is made
SHARDS_PER_ACTOR = 8  # of the recommended size, so that actors finish together
TOO_FEW_SHARDS = 3  # per actor
MAX_REASONS = 5
MATMUL_SIZE, MATMUL_SECONDS = 1536, 0.5

Progress = Callable[[str, int, int | None], None]  # called with (what, how many are done, of how many if that is known)


def plan_score(config: PlanConfig, units: list[ReadUnit], block_tokens: int, progress: Progress | None = None) -> dict:
    """The plan as JSON values; sizes in bytes, times in hours, operations in FLOPs.

    units: of `config.data`. block_tokens: tokens per shard of the run, within which rows are sorted by length.

    Raises:
        UserError: data, model or options cannot be used, or the wanted hours are too few.
    """
    _check_tangents(config)
    run = read_run(config, check_data(config, units))
    encode = sequence_encoder(config.model, config, config.trust_remote_code, run.pairs)
    data = survey_rows(units, encode, config.sample_rows, progress=progress)
    validation = None
    if config.validation and run.parameters:
        rows = sequence_encoder(config.model, config, config.trust_remote_code, False)
        validation = survey_rows(plan_units(validation_files(config.validation)), rows, config.sample_rows)
    device = this_machine(run.dtype) if config.device == "cpu" else DEVICES[config.device]
    fit = _fit(config, run, data, validation, block_tokens, device)
    hours = _hours(config, run, fit, device)
    changes = _recommended(config, fit, block_tokens, hours["actors"])
    return {
        "data": _data_figures(data, fit.work),
        "model": _model_figures(config, run),
        "memory": fit.figures(device),
        "flops": _flops(run, fit),
        "time": hours,
        "command": command_line(config.score_config(**changes)),
        "notes": _notes(config, run, data, fit, device, hours),
    }


def _check_tangents(config: PlanConfig) -> None:
    able = [name for name, device in DEVICES.items() if device.float8]
    if config.tangent_dtype and config.device not in able:
        raise UserError(
            f"--tangent-dtype float8 does not pay on --device {config.device}, which has no fast products of 8-bit "
            f"floats as {', '.join(able)} have; leave it out"
        )


# batches that fit


@dataclass(frozen=True)
class _Fit:
    """Work and memory with some budget of tokens per batch."""

    batch_tokens: int
    work: Work  # of all the data
    memory: Memory
    validation: Work | None
    direction: float  # bytes of the task that makes it; 0 where none is made

    @property
    def peak(self) -> float:
        return max(self.memory.total, self.direction)

    def figures(self, device: Device) -> dict:
        memory = self.memory
        return {
            "batch_tokens": self.batch_tokens,
            "largest_batch_positions": self.work.largest_positions,
            "weights": memory.weights,
            "reference": memory.reference,
            "directions": memory.copies,
            "activations": memory.activations,
            "logits": memory.logits,
            "starting": memory.weights + memory.starting,
            "actor": memory.total,
            "making_the_direction": self.direction,
            "device": device.memory_gb * 1e9,
            "fits": self.peak <= USABLE_MEMORY * device.memory_gb * 1e9,
        }


def _fit(
    config: PlanConfig, run: PlannedRun, data: Survey, validation: Survey | None, block_tokens: int, device: Device
) -> _Fit:
    """With --batch-tokens as given, else the largest halving of it that fits; as given where none does."""
    given = None
    batch_tokens = config.batch_tokens
    while True:
        fit = _fit_of(config, run, data, validation, block_tokens, batch_tokens)
        given = given or fit
        if fit.figures(device)["fits"]:
            return fit
        if batch_tokens // 2 < max(SMALLEST_BATCH_TOKENS, max(data.lengths)):  # a row is never split
            return given
        batch_tokens //= 2


def _fit_of(
    config: PlanConfig, run: PlannedRun, data: Survey, validation: Survey | None, block_tokens: int, batch_tokens: int
) -> _Fit:
    work = count_work(
        data.lengths, data.responses, batch_tokens, block_tokens, config.window, data.spans
    ).scaled(data.scale)  # fmt: skip
    memory = run.memory(work, config.device == "cpu")
    if validation is None:
        return _Fit(batch_tokens, work, memory, None, 0.0)
    mean = sum(validation.lengths) / len(validation.lengths)
    checked = count_work(
        validation.lengths, validation.responses, batch_tokens, int(mean * VALIDATION_ROWS), spans=validation.spans
    )
    direction = direction_memory(run.model, run.method, checked, run.dtype)
    return _Fit(batch_tokens, work, memory, checked.scaled(validation.scale), direction)


# figures


def _data_figures(data: Survey, work: Work) -> dict:
    p50, p90, p99 = np.percentile(data.lengths, [50, 90, 99], method="inverted_cdf")
    usable = data.sampled - data.unusable_rows
    return {
        "rows": data.rows,
        "encoded_rows": data.sampled,
        "scaled_up": data.sampled < data.rows,
        "unusable_rows": round(data.unusable_rows * data.scale),
        "unusable_reasons": {
            reason: round(count * data.scale) for reason, count in list(data.unusable.items())[:MAX_REASONS]
        },
        "tokens": round(work.tokens),
        "response_tokens": round(work.response_tokens),
        "lengths": {"p50": int(p50), "p90": int(p90), "p99": int(p99), "max": max(data.lengths)},
        "truncated_share": data.truncated / usable,
        "padding_share": work.padding_share,
        "batches": round(work.batches),
        "encoding_tokens_per_second": data.tokens_per_second,
    }


def _model_figures(config: PlanConfig, run: PlannedRun) -> dict:
    return {
        "model": config.model,
        "parameters": run.model.parameters,
        "scored_parameters": run.model.scored(run.method),
        "scored": run.parameters,
        "estimator": config.estimator,
        "method": run.method_name,
        "dtype": run.dtype,
        "pairs": run.pairs,
    }


def _flops(run: PlannedRun, fit: _Fit) -> dict:
    forward, scoring = forward_flops(run.model, fit.work), run.score(fit.work)
    direction = direction_flops(run.model, run.method, fit.validation) if fit.validation else 0.0
    return {"forward": forward, "scoring": scoring, "scoring_over_forward": scoring / forward, "direction": direction}


def _hours(config: PlanConfig, run: PlannedRun, fit: _Fit, device: Device) -> dict:
    """Hours. Devices are paid for as long as the run takes, also while one of them makes the direction."""
    peak = 1e12 * (device.bfloat16 if run.dtype == "bfloat16" else device.float32)
    rate = peak * config.device_utilization
    flops = _flops(run, fit)
    serial, parallel = flops["direction"] / rate / 3600, flops["scoring"] / rate / 3600
    actors = config.num_actors or 1
    if config.hours:
        found = actors_for(serial, parallel, config.hours)
        if found is None:
            raise UserError(
                f"--hours {config.hours:g}: one device makes the direction for {duration(serial)} before the actors "
                "start; make it ahead with `alphatoken direction`, or give more hours"
            )
        actors = found
    wall_clock = serial + parallel / actors
    return {
        "device": config.device,
        "peak_tflops": peak / 1e12,
        "utilization": config.device_utilization,
        "direction_hours": serial,
        "scoring_device_hours": parallel,
        "actors": actors,
        "wall_clock_hours": wall_clock,
        "device_hours": actors * wall_clock,
        "tokens_per_second_per_actor": fit.work.tokens / (parallel * 3600),
        "price": config.price,
        "cost": None if config.price is None else config.price * actors * wall_clock,
    }


# advice


def _recommended(config: PlanConfig, fit: _Fit, block_tokens: int, actors: int) -> dict:
    """Settings of the score run that differ from what was given."""
    changes: dict[str, Any] = {"batch_tokens": fit.batch_tokens, "num_actors": str(actors)}
    if config.device != "cpu":
        changes["gpus_per_actor"] = 1
    if actors > 1 and not config.shard_tokens and fit.work.tokens < TOO_FEW_SHARDS * actors * block_tokens:
        changes["shard_tokens"] = max(fit.batch_tokens, int(fit.work.tokens / (SHARDS_PER_ACTOR * actors)))
    return changes


def _notes(config: PlanConfig, run: PlannedRun, data: Survey, fit: _Fit, device: Device, hours: dict) -> list[str]:
    """What the figures leave out, and what to change: one sentence each."""
    notes = []
    if data.sampled < data.rows:
        notes.append(f"scaled up from {data.sampled} of {data.rows} rows, drawn evenly from all files")
    if not fit.figures(device)["fits"]:
        makes = fit.direction > fit.memory.total
        notes.append(
            f"does not fit: {'making the direction' if makes else 'an actor'} takes {fit.peak / 1e9:.1f} GB of "
            f"{device.memory_gb:.0f} GB, and smaller batches do not help enough; use a device with more memory"
            + (" (for the direction alone: `alphatoken direction`)" if makes else "")
            + ", or score fewer weights with --parameters last-layers:K"
        )
    elif fit.batch_tokens < config.batch_tokens:
        notes.append(f"--batch-tokens {config.batch_tokens} does not fit; all figures are for {fit.batch_tokens}")
    if run.parameters and not (config.validation or config.direction):
        notes.append(f"the direction is not counted; put your validation files in the place of {NO_VALIDATION}")
    encoding = data.largest_unit / data.rows * fit.work.tokens / data.tokens_per_second / 3600
    if encoding > max(hours["wall_clock_hours"], 1 / 60):
        notes.append(
            f"the largest input is encoded by one task, for about {duration(encoding)}: longer than scoring takes; "
            "split it into more files, or write it as Parquet with many row groups"
        )
    if hours["actors"] > fit.work.batches:
        notes.append(f"there are only {fit.work.batches:.0f} batches, so fewer actors finish as early")
    if config.device == "cpu":
        notes.append("peak is a matrix product measured just now, so other load makes hours look longer")
        if hours["actors"] > 1:
            notes.append("each actor is counted as a machine of its own like this one")
    if config.utilization is None:
        notes.append(
            f"a utilization of {config.device_utilization:g} is assumed, not measured: score some rows, compare, and "
            "give --utilization"
        )
    notes.append("starting Ray, loading the model, encoding, checks of the direction and writing are not counted")
    return notes


def duration(hours: float) -> str:
    """For people."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"


# this machine


def this_machine(dtype: str) -> Device:
    """Its physical memory, and the speed of its processor in products of `dtype`, measured for half a second."""
    speed = measured_matmul(getattr(torch, dtype)) / 1e12
    return Device(speed, speed, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)


def measured_matmul(dtype: torch.dtype, size: int = MATMUL_SIZE, seconds: float = MATMUL_SECONDS) -> float:
    """FLOP/s of the fastest of several products of square matrices, with all threads that torch has."""
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    fastest, begun = float("inf"), time.perf_counter()
    torch.mm(left, right)  # warms up: threads, packing
    while time.perf_counter() - begun < seconds or fastest == float("inf"):
        started = time.perf_counter()
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest
