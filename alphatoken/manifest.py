"""manifest.json, which says what a run did and with what, and README.md, the data card for people and hubs."""

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alphatoken.columns import meaning_in, type_name

PACKAGES = ("alphatoken", "torch", "transformers", "ray", "datasets", "pyarrow")


CONTROLS = ("loss", "entropy", "excess_loss", "random")  # estimators that know no target
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
OTHERS = "other reasons"


def alike(reason: str) -> str:
    """The same for reasons that differ in numbers alone."""
    return NUMBER.sub("#", reason)


def most_reasons(reasons: Mapping[str, int], most: int) -> dict[str, int]:
    """Rows by reason, most frequent first; like ones together, and those beyond `most` as `OTHERS`, so sums stay."""
    texts: dict[str, Counter] = {}
    for reason, rows in reasons.items():
        texts.setdefault(alike(reason), Counter())[reason] += rows
    merged = Counter({next(iter(found)) if len(found) == 1 else name: found.total() for name, found in texts.items()})
    shown = dict(merged.most_common(most))
    left = merged.total() - sum(shown.values())
    return shown | ({OTHERS: shown.get(OTHERS, 0) + left} if left else {})


def told_reasons(reasons: Mapping[str, int], most: int = 3) -> str:
    """For one line."""
    return "; ".join(f"{rows:,} x {reason}" for reason, rows in most_reasons(reasons, most).items())


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
        {"name": field.name, "type": type_name(field), "meaning": meaning_in(stage, field.name)} for field in columns
    ]
    estimator = manifest.get("scored", manifest)["config"].get("estimator")
    control = estimator if estimator in CONTROLS else None
    for row in rows if control else ():
        if row["name"].endswith("adaptation"):
            row["meaning"] = f"what the control `{control}` says of the token"
    pairs = "chosen_ids" in columns.names
    # No `configs` in its metadata: with them, datasets takes any folder of the same name for this one, from its cache.
    return _template().render(stage=stage, manifest=manifest, columns=rows, pairs=pairs, control=control)


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
