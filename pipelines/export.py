"""MASKED folder in, a folder that another training stack reads out. One process, one shard after the other: no model,
no GPU, and disks are what it waits for.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from alphatoken import manifest as manifests
from alphatoken import storage
from alphatoken.config import ExportConfig
from alphatoken.errors import UserError
from alphatoken.export_formats import Format, format_of
from alphatoken.run_folder import RunFolder, first_row_id_of, manifest_of

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (shards done, shards in all)


def run_export(config: ExportConfig, progress: Progress | None = None) -> dict:
    """Write `config.output` and return its manifest. Resumes a run that was cut off.

    Raises UserError where the input is not a finished MASKED folder or the stack cannot use its masks.
    """
    started = time.monotonic()
    source, target = storage.absolute(config.input), storage.absolute(config.output)
    masked = manifest_of(source, "mask", "--input")
    chosen = format_of(config.to, bool(masked.get("pairs")))
    if storage.same_place(source, target):
        raise UserError(f"--output {config.output} is the input folder; give another one")
    if chosen.as_dataset and not storage.is_local(target):
        raise UserError(f"--to {config.to} reads a local folder; give a local --output and copy it where it is needed")
    folder = RunFolder(target)
    identity = {"stage": "export", "to": config.to, "input": source, "masked": manifests.fingerprint(masked)}
    if folder.open(identity, config.overwrite) == "finished":
        logger.info("%s is already finished", target)
        return folder.manifest()
    rows = _write_shards(storage.list_shards(source), chosen, folder, progress)
    if chosen.as_dataset:
        _save_dataset(target)
    counts = {"rows_in": masked["counts"]["rows_out"], "rows_out": rows}
    seconds = time.monotonic() - started
    more = {"to": config.to, "snippet": chosen.snippet.format(folder=config.output), "note": chosen.note}
    manifest = manifests.build_manifest(
        "export", config.model_dump(mode="json"), counts, masked["fingerprints"], seconds, extra=more
    )
    folder.finish(manifest, _card(manifest))
    return manifest


def _write_shards(shards: list[str], chosen: Format, folder: RunFolder, progress: Progress | None) -> int:
    """Rows of all shards, those of an earlier attempt included."""
    done = {record["shard"]: record["rows"] for record in folder.commits()}
    for number, shard in enumerate(shards, start=1):
        name = storage.name_of(shard)
        if name not in done:
            table = storage.read_table(shard)
            record = {
                "first_row_id": first_row_id_of(name),
                "row_ids": [],
                "shard": name,
                "rows": table.num_rows,
            }
            folder.write_shard(chosen.columns(table).replace_schema_metadata(None), None, record)
            done[name] = table.num_rows
        if progress:
            progress(number, len(shards))
    return sum(done.values())


def _save_dataset(target: str) -> None:
    """TARGET/dataset as `save_to_disk` writes it, from TARGET/data; it appears at once, when it is whole."""
    import datasets

    unfinished, final = Path(target, ".dataset"), Path(target, "dataset")
    storage.remove_tree(str(unfinished))
    storage.remove_tree(str(final))
    rows = datasets.Dataset.from_parquet(storage.list_shards(target), cache_dir=str(unfinished / "cache"))
    datasets.DatasetDict({"train": rows}).save_to_disk(unfinished / "dataset")
    (unfinished / "dataset").rename(final)
    storage.remove_tree(str(unfinished))


def _card(manifest: dict) -> str:
    language = "yaml" if "tokenized_path" in manifest["snippet"] or "ds_type" in manifest["snippet"] else "python"
    note = f"\n{manifest['note']}\n" if manifest["note"] else ""
    rows = f"{manifest['counts']['rows_out']:,} rows"
    return (
        f"# Token-masked data for {manifest['to']}\n\n{rows}. The stack is told so:\n\n"
        f"```{language}\n{manifest['snippet'].strip()}\n```\n{note}\n"
        "Values belong to the checkpoint that they were computed at and go stale within a dozen optimizer steps.\n"
    )


