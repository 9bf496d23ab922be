"""SCORED folder in, MASKED folder out: which response tokens are trained on. No model, no GPU.

One Ray task per shard, one output shard per input shard, under the same name. What all rows decide together (bounds of
suspects, the data set's threshold, dropped sequences) is found first, by passes that count (mask_passes.py); what the
driver holds does not grow with the data.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.data

from alphatoken import manifest as manifests
from alphatoken import masking, selection, storage
from alphatoken.errors import UserError
from alphatoken.mask_config import MaskConfig, rule_for
from alphatoken.masking import MaskPlan
from alphatoken.pair_masking import Thresholds, mask_pair_table
from alphatoken.run_folder import RunFolder, first_row_id_of, manifest_of, row_id_runs
from alphatoken.suspects import FEW_ROWS, FEW_ROWS_WARNING, LossProfile
from alphatoken.targets import weights_of
from pipelines import mask_passes, metrics
from pipelines.cluster import connect, user_errors

STALE_WARNING = (
    "values belong to the checkpoint that they were computed at and go stale within a dozen optimizer steps: a mask "
    "made once at the start and frozen over a whole run hurt in trials (worse than training on every token). Train on "
    "this data for a short interval, then score and mask again with the new weights."
)

FEWEST_TOKENS = 30  # of a class, to speak of its share
UNLIKELY = 0.005
ABOUT_SCORING = ("created", "counts", "config", "fingerprints", "parameters")  # kept of its manifest
UNUSUAL_GAP = 0.3  # between the kept share of a class and that of all tokens

Progress = Callable[[int, int], None]  # (shards done, shards in all)

logger = logging.getLogger(__name__)


def run_mask(config: MaskConfig, progress: Progress | None = None) -> dict:
    """Write the MASKED folder `config.output` and return its manifest. Resumes a run that was cut off.

    Raises UserError where the input is not a finished SCORED folder or lacks what the rule needs, the output belongs to
    something else, or a token class is unknown. `progress` is called after each shard.
    """
    started = time.monotonic()
    source, target = storage.absolute(config.input), storage.absolute(config.output)
    if storage.same_place(source, target):
        raise UserError(f"--output {config.output} is the input folder; give another one")
    scored = manifest_of(source, "score", "--input")
    shards = storage.list_shards(source)
    pairs = bool(scored.get("pairs"))
    if pairs and config.weights:
        raise UserError("--weights is for rows of SFT: DPO training knows no soft weights")
    rule = rule_for(config, scored)
    plan, class_names = _plan(config, source, rule)
    targets = weights_of(scored.get("targets", []), config.target_weights, config.input)
    plan = replace(plan, target_weights=targets)
    fingerprints = {**scored["fingerprints"], "scored_manifest": manifests.fingerprint(scored)}
    if rule == "share":
        logger.warning(STALE_WARNING)
    elif (rows := scored["loss_profile"]["rows"]) < FEW_ROWS:
        logger.warning(FEW_ROWS_WARNING, rows)

    folder = RunFolder(target)
    if folder.open(_identity(config, source, rule, fingerprints), config.overwrite) == "finished":
        logger.info("%s is already finished", target)
        return folder.manifest()
    connect()
    with user_errors():
        if rule != "share":
            profile = LossProfile.from_json(scored["loss_profile"], class_names)
            plan = replace(plan, bounds=mask_passes.bounds(plan, shards, profile))
        plan = mask_passes.with_dropped_rows(plan, shards, config.drop_sequences)
        thresholds = mask_passes.thresholds(plan, shards, config.scope, pairs)
        _mask_shards(shards, plan, thresholds, folder, progress)
    _copy_token_classes(source, target)
    counts = _counts(folder)
    by_class = _kept_by_class(folder, class_names)
    stays = 1 - counts["dropped_row_tokens"] / counts["response_tokens"]
    for sentence in unbalanced(by_class, counts["kept_fraction"], stays):
        logger.warning(sentence)
    result = manifests.build_manifest(
        "mask",
        config.model_dump(mode="json") | {"rule": rule},
        counts,
        fingerprints,
        time.monotonic() - started,
        extra={
            # An infinite threshold stands for 'no token to choose from', and is not JSON.
            "threshold": mask_passes.finite(thresholds, pairs),
            "rule": rule,
            "bounds": None if plan.bounds is None else plan.bounds.to_json(class_names),
            "pairs": pairs,
            "kept_by_class": by_class,
            "workers": metrics.time_per_worker(folder.commits()),
            "scored": {name: scored.get(name) for name in ABOUT_SCORING},
        },
    )
    columns = storage.read_schema(storage.list_shards(target)[0])
    folder.finish(result, manifests.data_card("mask", result, columns))
    return result


def _identity(config: MaskConfig, source: str, rule: str, fingerprints: dict) -> dict:
    """What makes two runs the same: all that decides on the output, not where it lies."""
    excluded = {"output", "overwrite", "preset"} | (set() if config.target_weights else {"target_weights"})
    settings = config.model_dump(mode="json", exclude=excluded) | {"rule": rule, "input": source}
    return {"stage": "mask", "config": settings, "fingerprints": fingerprints}


def _plan(config: MaskConfig, source: str, rule: str) -> tuple[MaskPlan, list[str]]:
    """The plan, and the names of the token classes that it numbers; a folder without a table of them has none."""
    plan = MaskPlan(config.keep_fraction, config.stability_weight, config.min_value, config.weights)
    plan = replace(plan, bounds_and_value=rule != "surprising")
    table_uri = storage.join(source, "token_classes.parquet")
    if not config.protect and rule == "share" and not storage.exists(table_uri):
        return plan, []
    table = storage.read_table(table_uri, ["token_id", "token_class"])
    classes = table["token_class"].unify_dictionaries().combine_chunks()
    token_ids = table["token_id"].to_numpy()
    class_of_token = np.full(int(token_ids.max()) + 1, -1, dtype=np.int8)
    class_of_token[token_ids] = classes.indices.to_numpy(zero_copy_only=False)
    names = classes.dictionary.to_pylist()
    if config.protect:
        plan = replace(plan, protected_classes=selection.class_numbers(config.protect, names))
    return replace(plan, class_of_token=class_of_token), names


def _mask_shards(
    shards: list[str], plan: MaskPlan, thresholds: Thresholds, folder: RunFolder, progress: Progress | None
) -> None:
    """Mask what is not yet committed, one Ray task per shard."""
    done = {record["shard"] for record in folder.commits()}
    todo = [shard for shard in shards if storage.name_of(shard) not in done]
    if done:
        logger.info("resuming: %d of %d shards were already finished", len(done), len(shards))
    if not todo:
        return
    rows = ray.data.from_items([{"shard": shard} for shard in todo], override_num_blocks=len(todo))
    masked = rows.map(_mask_shard, fn_kwargs={"plan": plan, "thresholds": thresholds, "output": folder.uri})
    for number, _ in enumerate(masked.iter_rows(), start=len(done) + 1):
        if progress:
            progress(number, len(shards))


def _mask_shard(row: dict[str, Any], plan: MaskPlan, thresholds: Thresholds, output: str) -> dict[str, Any]:
    """Read, mask and write one shard; only its name goes back to the driver."""
    started = time.monotonic()
    table = mask_passes.read(row["shard"], plan)
    if "chosen_ids" in table.column_names:
        result = mask_pair_table(table, plan, thresholds, row["shard"])
    else:
        result = masking.mask_table(table, replace(plan, threshold=thresholds.get(mask_passes.ROWS)), row["shard"])
    name = storage.name_of(row["shard"])
    record = {
        "first_row_id": first_row_id_of(name),
        "shard": name,
        "row_ids": row_id_runs(table["row_id"].to_numpy()),
        "counts": result.counts,
        "worker": metrics.worker_id(),
        "seconds": round(time.monotonic() - started, 3),
        "by_class": None if result.by_class is None else result.by_class.tolist(),
    }
    RunFolder(output).write_shard(result.data, result.quarantine, record)
    metrics.count_shard("mask", record | {"reasons": Counter(result.quarantine["reason"].to_pylist())})
    return {"shard": name}


def _counts(folder: RunFolder) -> dict[str, Any]:
    """Sums over the commit records; UserError if no row is left."""
    records = [record["counts"] for record in folder.commits()]
    counts: dict[str, Any] = {name: sum(record[name] for record in records) for name in records[0]}
    if not counts["rows_out"]:
        raise UserError(f"no row is left after masking; the reasons are in {storage.join(folder.uri, 'quarantine')}")
    return counts | {"kept_fraction": round(counts["kept_tokens"] / counts["response_tokens"], 6)}


def _kept_by_class(folder: RunFolder, names: list[str]) -> dict[str, dict[str, int]]:
    """Response tokens and kept ones, by token class; empty where classes are not known."""
    found = [np.array(record["by_class"]) for record in folder.commits() if record.get("by_class")]
    total = np.zeros((len(names), 2), dtype=np.int64)
    for counts in found:
        total[: len(counts)] += counts
    return {
        name: {"response_tokens": tokens, "kept_tokens": kept}
        for name, (tokens, kept) in zip(names, total.tolist(), strict=True)
        if tokens
    }


def unbalanced(by_class: dict[str, dict[str, int]], kept_fraction: float, stays: float = 1.0) -> list[str]:
    """A sentence for each token class that is dropped far more often than tokens are on average.

    stays: part of the tokens that is in rows which were not dropped as a whole; only there can classes differ.
    """
    sentences = []
    for name, counts in by_class.items():
        rate = counts["kept_tokens"] / counts["response_tokens"]
        by_chance = (1 - kept_fraction) ** counts["response_tokens"]  # that all of them go
        many = counts["response_tokens"] >= FEWEST_TOKENS
        if (many and rate < kept_fraction - stays * UNUSUAL_GAP) or (not rate and by_chance < UNLIKELY):
            sentences.append(
                f"only {rate:.0%} of the {name} tokens are kept, of all response tokens {kept_fraction:.0%}: the model "
                f"would hardly be trained on them; --protect {name} keeps them, and values may be about the format "
                "more than about the task"
            )
    return sentences


def _copy_token_classes(source: str, target: str) -> None:
    uri = storage.join(source, "token_classes.parquet")
    if storage.exists(uri):
        storage.write_bytes(storage.read_bytes(uri), storage.join(target, "token_classes.parquet"))
