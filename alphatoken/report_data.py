"""A sample of a SCORED or MASKED folder as the JSON that the report page works on.

Everything that the page computes (masks, shares by class, histograms) it computes from these rows, so that sliders act
on all of it. Numbers of the whole run come from its manifests.

Per-token arrays are flat over all responses, little-endian and base64: exact, and a third of the size of JSON. A
"response" is all response tokens of a row, or one branch of a pair. A row also has its tokens in order (of a pair: its
prompt's), and which of them are response.
"""

import base64
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.manifest import OTHERS, alike, told_reasons
from alphatoken.mask_config import OF_SHARE, MaskConfig, rule_for
from alphatoken.masking import flat, losses_of
from alphatoken.schema import BRANCHES
from alphatoken.suspects import LossProfile, counts_above
from alphatoken.token_classes import TOKEN_CLASS_NAMES, class_ids

MOST_SHARDS = 32  # that rows are drawn from
MOST_QUARANTINE_FILES = 200
SHARED_REASONS = 12
STAGES = ("score", "mask")
# Settings that decide on a mask, beside its rule.
OF_MASK = ("input", "target_weights", *OF_SHARE, "stability_weight", "protect")
ROW_NUMBERS = 10**9  # row ids of one input file


@dataclass
class Tokens:
    """Flat per-token lists of all responses, in the order of their rows."""

    ids: list[np.ndarray] = field(default_factory=list)
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, ids: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        self.ids.append(ids)
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values)


def report_data(folder: str, num_rows: int, seed: int, group_by: str | None, compare: str | None) -> dict:
    """The page's data as JSON values.

    num_rows: rows (pairs) to draw, the same for a seed. group_by: a column to count kept tokens by; default: the input
    file. compare: another folder scored from the same rows, to compare its adaptation with this one's. Raises UserError
    where a folder is not a finished SCORED or MASKED one, or lacks what is asked for.
    """
    manifest = _manifest(folder)
    table = sample(folder, num_rows, seed)
    pairs = bool(manifest.get("pairs"))
    if group_by and group_by not in table.column_names:
        raise UserError(f"{folder} has no column {group_by}; it has {', '.join(table.column_names)}")
    tokens, orders, responses = Tokens(), [], []
    other = _other_values(compare, table, pairs) if compare else None
    for index in range(table.num_rows):
        row = table.slice(index, 1)
        order, inside, found = (_pair if pairs else _row)(row)
        orders.append((order, inside))
        for branch, ids, columns in found:
            if other is not None:
                columns |= other[index, branch]
            responses.append({"row": index, "branch": branch, "length": len(ids)})
            tokens.add(ids, columns)
    token_classes = storage.read_table(storage.join(folder, "token_classes.parquet"))
    texts, classes, vocabulary = _vocabulary(token_classes, [*tokens.ids, *(ids for ids, _ in orders)])
    return {
        "rows": _rows(table, group_by),
        "orders": [{"ids": _packed(vocabulary(ids), "<i4"), "inside": _packed(mask, "u1")} for ids, mask in orders],
        "responses": responses,
        "tokens": _packed(vocabulary(np.concatenate(tokens.ids)), "<i4"),
        "columns": {name: _packed(np.concatenate(parts), "<f4") for name, parts in tokens.columns.items()},
        "texts": texts,
        "classes": classes,
        "class_names": list(TOKEN_CLASS_NAMES),
        "pairs": pairs,
        "settings": _settings(folder, manifest, table, token_classes),
        "facts": _facts(folder, manifest, table.num_rows),
        "quarantine": quarantine_reasons(folder, manifest["counts"]),
        "compared_with": compare,
    }


def sample(folder: str, num_rows: int, seed: int) -> pa.Table:
    """`num_rows` rows of a folder, drawn at random from at most MOST_SHARDS shards; all where there are fewer."""
    draw = np.random.default_rng(seed)
    shards = storage.list_shards(folder)
    if len(shards) > MOST_SHARDS:
        shards = [shards[i] for i in np.sort(draw.choice(len(shards), MOST_SHARDS, replace=False))]
    counts = [storage.count_rows(shard) for shard in shards]
    total = sum(counts)
    picked = np.sort(draw.choice(total, min(num_rows, total), replace=False))
    parts, first = [], 0
    for shard, count in zip(shards, counts, strict=True):
        inside = picked[(picked >= first) & (picked < first + count)] - first
        if len(inside):
            parts.append(storage.read_table(shard).take(pa.array(inside)))
        first += count
    return pa.concat_tables(parts, promote_options="default")


def quarantine_reasons(folder: str, counts: dict) -> list[dict]:
    """Reasons of rows left out, most frequent first, with numbers in them replaced so that like ones count together.

    Rows add up to those that `counts`, of the manifest, say were left out: what is not shown, or was not read, comes
    last.
    """
    place = storage.join(folder, "quarantine")
    names = [name for name in storage.list_names(place) if name.endswith(".parquet")]
    found: Counter = Counter()
    for name in names[:MOST_QUARANTINE_FILES]:
        table = storage.read_table(storage.join(place, name), ["stage", "reason"])
        for stage, reason in zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True):
            found[stage, alike(reason or "")] += 1
    shown = [
        {"stage": stage, "reason": reason, "rows": count}
        for (stage, reason), count in found.most_common(SHARED_REASONS)
    ]
    others = found.total() - sum(line["rows"] for line in shown)
    unread = counts.get("rows_quarantined", 0) + counts.get("rows_dropped_sequences", 0) - found.total()
    rest = {OTHERS: others, f"not read: quarantine files after the first {MOST_QUARANTINE_FILES}": unread}
    return shown + [{"stage": "", "reason": reason, "rows": rows} for reason, rows in rest.items() if rows > 0]


def _manifest(folder: str) -> dict:
    uri = storage.join(folder, "manifest.json")
    if not storage.exists(uri):
        raise UserError(f"{folder} is no finished folder of `score` or `mask`: it has no manifest.json")
    manifest = storage.read_json(uri)
    if manifest.get("stage") not in STAGES:
        raise UserError(f"{folder} was written by {manifest.get('stage')}; a report needs a folder of score or mask")
    return manifest


Response = tuple[str, np.ndarray, dict[str, np.ndarray]]  # branch, ids, columns


def _row(row: pa.Table) -> tuple[np.ndarray, np.ndarray, list[Response]]:
    """(all ids, which are response, the response) of a row of SFT."""
    mask, ids = flat(row, "response_mask"), flat(row, "input_ids")
    columns = {name: flat(row, name)[mask] for name in ("adaptation", "stability", "logprobs")}
    return ids, mask, [("response", ids[mask], columns)]


def _pair(row: pa.Table) -> tuple[np.ndarray, np.ndarray, list[Response]]:
    """(prompt ids, none of which is response, both branches) of a pair."""
    found: list[Response] = []
    for branch in BRANCHES:
        columns = {name: flat(row, f"{branch}_{name}") for name in ("adaptation", "stability", "logprobs")}
        found.append((branch, flat(row, f"{branch}_ids"), columns))
    prompt = flat(row, "prompt_ids")
    return prompt, np.zeros(len(prompt), dtype=bool), found


def _other_values(folder: str, table: pa.Table, pairs: bool) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """Adaptation and stability of the same rows in another folder, as more columns, by (row index, branch)."""
    if bool(_manifest(folder).get("pairs")) != pairs:
        raise UserError(f"{folder} cannot be compared: one of the two folders has pairs, the other has rows")
    wanted = {row_id: index for index, row_id in enumerate(table["row_id"].to_pylist())}
    prefixes = {branch: f"{branch}_" for branch in BRANCHES} if pairs else {"response": ""}
    ids = "ids" if pairs else "input_ids"
    needed = ["row_id"] if pairs else ["row_id", "response_mask"]
    needed += [prefix + name for prefix in prefixes.values() for name in (ids, "adaptation", "stability")]
    found = {}
    for shard in storage.list_shards(folder):
        part = storage.read_table(shard, needed)
        for place, row_id in enumerate(part["row_id"].to_pylist()):
            if row_id not in wanted:
                continue
            index, row = wanted[row_id], part.slice(place, 1)
            for branch, prefix in prefixes.items():
                if not np.array_equal(flat(row, prefix + ids), flat(table.slice(index, 1), prefix + ids)):
                    raise UserError(f"{folder}: row {row_id} has other tokens than here; score the same data with both")
                inside = slice(None) if pairs else flat(row, "response_mask")
                values = {"other": "adaptation", "other_stability": "stability"}
                found[index, branch] = {new: flat(row, prefix + name)[inside] for new, name in values.items()}
    missing = [row_id for row_id, index in wanted.items() if (index, next(iter(prefixes))) not in found]
    if missing:
        raise UserError(f"{folder} lacks row {missing[0]} and {len(missing) - 1} more; score the same data with both")
    return found


def _vocabulary(table: pa.Table, ids: list[np.ndarray]):
    """(texts, class numbers, a function from token ids to places in these lists) of the token ids that occur."""
    used = np.unique(np.concatenate(ids))
    texts = dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    numbers = class_ids(table)
    shown = [texts.get(token) or f"<{token}>" for token in used.tolist()]
    classes = [int(numbers[token]) if token < len(numbers) else 1 for token in used.tolist()]
    return shown, classes, lambda wanted: np.searchsorted(used, wanted)


def _rows(table: pa.Table, group_by: str | None) -> list[dict]:
    groups = [str(value) for value in table[group_by].to_pylist()] if group_by else _files(table)
    names = ("id", "row_id", "mean_loss", "truncated")
    columns = {name: table[name].to_pylist() for name in names}
    return [
        {"id": columns["id"][i], "row_id": columns["row_id"][i], "mean_loss": _finite(columns["mean_loss"][i]),
         "truncated": bool(columns["truncated"][i]), "group": groups[i]}
        for i in range(table.num_rows)
    ]  # fmt: skip


def _files(table: pa.Table) -> list[str]:
    return [f"input file {row_id // ROW_NUMBERS + 1}" for row_id in table["row_id"].to_pylist()]


def _settings(folder: str, manifest: dict, table: pa.Table, token_classes: pa.Table) -> dict:
    """What the sliders begin with: the mask's own settings, or `mask`'s defaults with bounds by the rows shown here."""
    defaults = MaskConfig(input=folder, output="-")
    settings = defaults.model_dump(include=set(OF_MASK))
    if manifest["stage"] == "mask":
        stored = {name: manifest["config"].get(name, settings[name]) for name in OF_MASK}  # older ones have fewer
        more = {name: manifest.get(name) for name in ("threshold", "bounds")}
        return stored | more | {"rule": manifest.get("rule", "share"), "estimated": False}
    rule, bounds = rule_for(defaults, manifest), None
    if rule != "share":
        profile = LossProfile.from_json(manifest["loss_profile"], TOKEN_CLASS_NAMES)
        losses = losses_of(table, class_ids(token_classes))
        bounds = profile.bounds(counts_above(losses, profile.candidates)).to_json(TOKEN_CLASS_NAMES)
    more = {"threshold": None, "bounds": bounds, "rule": rule, "estimated": True}
    return settings | more


def _facts(folder: str, manifest: dict, shown: int) -> list[list[str]]:
    """(name, text) lines about the run."""
    counts, scored = manifest["counts"], manifest.get("scored", manifest)
    config = scored["config"]
    parameters = config.get("parameters") or scored.get("parameters") or "as the direction's"
    lines = [
        ["folder", f"{folder} ({'masked' if manifest['stage'] == 'mask' else 'scored'} {manifest['created']})"],
        ["shown here", f"{shown:,} of {counts['rows_out']:,} rows"],
        ["rows", ", ".join(f"{counts[name]:,} {name[5:].replace('_', ' ')}" for name in counts if "rows_" in name)],
        ["response tokens", f"{counts['response_tokens']:,}"],
        ["model", str(config["model"])],
        ["estimator", f"{config['estimator']}, parameters {parameters}"],
        ["data", ", ".join(config["data"])],
        ["validation", ", ".join(config["validation"]) or str(config.get("direction"))],
    ]  # fmt: skip
    if "kept_fraction" in counts:
        lines.insert(4, ["kept", f"{counts['kept_fraction']:.1%} of {counts['response_tokens']:,} response tokens"])
    if manifest["stage"] == "mask" and scored["counts"].get("rows_quarantined"):
        before = scored["counts"]
        left_out = f"{before['rows_quarantined']:,} of {before['rows_in']:,} rows"
        lines.insert(3, ["left out by score", f"{left_out}: {told_reasons(before['quarantine_reasons'])}"])
    return lines


def _packed(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
