"""manifest.json, which says what a run did and with what, and README.md, the data card for people and hubs."""

import hashlib
import json
import platform
import re
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

PACKAGES = ("alphatoken", "torch", "transformers", "ray", "datasets", "pyarrow")
TARGET_COLUMN = re.compile(r"(mean_|chosen_|rejected_)?adaptation\.(.+)")

COLUMNS = {
    "row_id": "unique number of the row: file index * 10^9 + row number in the file",
    "id": "the input row's own id, else `<file name>:<row number>`",
    "input_ids": "token ids of prompt and response, special tokens included",
    "response_mask": "true where `input_ids[i]` is a response token",
    "truncated": "true where the row was cut at the maximum length",
    "labels": "`input_ids[i]` where the token is trained on, -100 elsewhere (unshifted, as transformers expects)",
    "value": "adaptation + stability_weight * stability; 0 outside the response",
    "weights": "soft weights: 1 where kept, by rank below 1 for dropped response tokens, 0 outside the response",
    "adaptation": "positive: training on the token lowers the validation loss",
    "stability": "positive: training on the token reduces the drift from the reference model",
    "logprobs": "natural log-probability of `input_ids[i]` given the tokens before it",
    "num_response_tokens": "number of response tokens",
    "mean_adaptation": "mean adaptation over the response tokens",
    "mean_stability": "mean stability over the response tokens",
    "mean_loss": "mean loss over the response tokens",
    "adaptation_direct": "the paper's direct term of adaptation",
    "adaptation_causal": "the paper's causal term of adaptation",
    "stability_direct": "the paper's direct term of stability",
    "stability_causal": "the paper's causal term of stability",
}


def check_counts(counts: dict) -> None:
    """Every row that came in went out, to quarantine, or was dropped; RuntimeError if one was lost or doubled."""
    parts = ("rows_out", "rows_quarantined", "rows_dropped_sequences")
    total = sum(counts.get(name, 0) for name in parts)
    if counts["rows_in"] != total:
        detail = ", ".join(f"{name} {counts.get(name, 0)}" for name in parts)
        raise RuntimeError(f"rows were lost or doubled: {counts['rows_in']} in, {total} accounted for ({detail})")


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def build_manifest(
    stage: str, config: dict, counts: dict, fingerprints: dict, seconds: float, extra: dict | None = None
) -> dict:
    """What `stage` did, as JSON values. Raises RuntimeError if `counts` has rows_in and rows are missing."""
    if "rows_in" in counts:
        check_counts(counts)
    return {
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": counts,
        **(extra or {}),
        "config": config,
        "fingerprints": fingerprints,
        "seconds": round(seconds, 3),
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def data_card(stage: str, manifest: dict, columns: pa.Schema) -> str:
    """README.md of a data set folder (stage `score`, `mask`, ...), with the metadata block that hubs read."""
    rows = [
        {"name": field.name, "type": str(field.type).replace("element: ", "").replace("item: ", ""),
         "meaning": _meaning(field.name)}
        for field in columns
    ]  # fmt: skip
    return _template().render(stage=stage, manifest=manifest, columns=rows)


def _meaning(name: str) -> str:
    if target := TARGET_COLUMN.fullmatch(name):
        return f"{'mean ' if target[1] == 'mean_' else ''}adaptation for the target `{target[2]}` alone"
    return COLUMNS.get(name, "carried over from the input")


@cache
def _template():
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    # Jinja's own tojson filter escapes < > & ' for HTML.
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template("data_card.md.j2")


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
