"""Input files to a folder of encoded rows (ENCODED shards and quarantine), for stages that train as they score.

A cut-off run goes on with the rows that no commit record names, as score does.
"""

import time
from dataclasses import replace

from alphatoken import manifest as manifests
from alphatoken import storage
from alphatoken.config import DataOptions
from alphatoken.run_folder import RunFolder
from alphatoken.sources import ReadUnit, data_fingerprint
from pipelines.cluster import user_errors
from pipelines.encode import EncodePlan, encoded_dataset
from pipelines.shards import total_counts, write_block

BLOCK_BYTES = 16 * 2**20


def encode_folder(units: list[ReadUnit], plan: EncodePlan, output: str) -> dict:
    """Write `output` unless it is there already; returns its manifest. Ray has to run.

    Raises UserError where no row can be used, or the folder holds something else.
    """
    started = time.monotonic()
    folder = RunFolder(output)
    settings = plan.options.model_dump(mode="json", include=set(DataOptions.model_fields))
    settings |= {"model": plan.model, "kind": plan.kind, "longest_prompt": plan.longest_prompt}
    fingerprints = {"data": data_fingerprint(units)}
    if folder.open({"stage": "encode", "config": settings, "fingerprints": fingerprints}) == "finished":
        return folder.manifest()
    plan = replace(plan, finished=tuple((first, last) for first, last in folder.finished_row_ids()))
    with user_errors():
        written = encoded_dataset(units, plan, BLOCK_BYTES).map_batches(
            write_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"output": output}, num_cpus=0.5
        )
        for _ in written.iter_rows():
            pass
    manifest = manifests.build_manifest(
        "encode", settings, total_counts(folder), fingerprints, time.monotonic() - started
    )
    columns = storage.read_schema(storage.list_shards(output)[0])
    folder.finish(manifest, manifests.data_card("encode", manifest, columns))
    return manifest
