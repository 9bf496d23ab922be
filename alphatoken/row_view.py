"""Rows of any folder that a stage wrote, to look at: which texts there are in what order, and what is known per token.

    responses           prompt, response                         text
    pairs               prompt, chosen, rejected                 text
    encoded             row, or prompt, chosen, rejected         tokens
    scored, masked      the same, with values and kept tokens    tokens
    windows of rounds   as masked, or as encoded where nothing was valued

Where a folder does not say how its tokens read, the tokenizer of the model in its run.json does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from posixpath import dirname
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from alphatoken import storage
from alphatoken.errors import UserError
from alphatoken.schema import BRANCHES, PAIRS, RESPONSES

RUN_FILES = ("run.json", "manifest.json")
LEVELS = 3  # from a window up to its run
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SHOWN = 3
TRAINING = ("train", "rounds")
WRITTEN_AS_TEXT = (frozenset(PAIRS.names), frozenset(RESPONSES.names))


@dataclass(frozen=True)
class Token:
    """value: None outside the response and where nothing was valued."""

    text: str
    inside: bool  # of a response
    kept: bool = True
    value: float | None = None


@dataclass(frozen=True)
class Part:
    """A text of a row: name is empty for a row that is prompt and response in one."""

    name: str
    tokens: list[Token]

    @property
    def response(self) -> list[Token]:
        return [token for token in self.tokens if token.inside]


def read_rows(folder: str, ids: list[str], limit: int) -> list[dict]:
    """Rows as they are stored, in order, with the texts of their tokens: all with one of `ids`, else the first `limit`.

    `tokens` are those of `input_ids`; `prompt_tokens`, `chosen_tokens`, `rejected_tokens` those of `prompt_ids` and so
    on. Raises UserError for a folder without such rows and for an id that is not there.
    """
    folder = storage.absolute(folder)
    rows: list[dict] = []
    missing = set(ids)
    for shard in _shards(folder):
        if "id" not in storage.read_schema(shard).names:
            raise UserError(
                f"{folder}: its rows have no ids, so it is none that `score` or `mask` wrote{_made(folder)}"
            )
        found = _rows_of(shard, set(ids)) if ids else storage.read_table(shard).slice(0, limit)
        rows += found.to_pylist()
        missing -= set(found["id"].to_pylist())
        if not ids and len(rows) >= limit:  # an id may come again in any shard
            break
    if missing:
        raise UserError(_not_there(folder, sorted(missing)))
    return _with_texts(folder, rows if ids else rows[:limit])


def parts(row: dict) -> Iterator[Part]:
    """The texts of a row of `read_rows`."""
    if "tokens" in row:
        kept = [label >= 0 for label in row["labels"]] if "labels" in row else None
        values = row.get("value") or row.get("adaptation")
        yield Part("", _tokens(row["tokens"], row["response_mask"], kept, values))
    elif "chosen_tokens" in row:
        yield Part("prompt", _tokens(row["prompt_tokens"]))
        for branch in BRANCHES:
            values = row.get(f"{branch}_value") or row.get(f"{branch}_adaptation")
            texts = row[f"{branch}_tokens"]
            yield Part(branch, _tokens(texts, [True] * len(texts), row.get(f"{branch}_mask"), values))
    else:
        prompt = row.get("prompt_tokens") or [row.get("prompt") or ""]
        yield Part("prompt", _tokens(prompt))
        answers = BRANCHES if "chosen" in row else ("text" if "text" in row else "answer",)
        for name in answers:
            yield Part({"text": "response"}.get(name, name), _tokens([row.get(name) or ""], [True]))


def _tokens(
    texts: list[str],
    inside: list[bool] | None = None,
    kept: list[bool] | None = None,
    values: list[float] | None = None,
) -> list[Token]:
    inside = inside or [False] * len(texts)
    kept = kept or [True] * len(texts)
    known: list[Any] = list(values) if values else [None] * len(texts)
    columns = zip(texts, inside, kept, known, strict=True)
    return [Token(text, there, keep, value if there else None) for text, there, keep, value in columns]


# reading


def _shards(folder: str) -> list[str]:
    names = [name for name in storage.list_names(folder) if storage.DATA_PATTERN.match(name)]
    if names:  # a window of rounds
        return [storage.join(folder, name) for name in names]
    inside = storage.list_names(folder)
    if "data" not in inside and _run_of(folder).get("stage") in TRAINING:
        places = [storage.join(folder, "encoded")] if "encoded" in inside else []
        windows = storage.list_names(storage.join(folder, "windows"))
        places += [storage.join(folder, "windows", name) for name in windows[-SHOWN:]]
        hint = f"look at {', '.join(places)}" if places else "look at its --data"
        raise UserError(f"{folder} is a training run, which holds no rows itself: {hint}")
    return storage.list_shards(folder)


def _rows_of(shard: str, wanted: set[str]) -> pa.Table:
    """The rows with one of these ids; the samples of a prompt share theirs."""
    ids = storage.read_table(shard, ["id"])["id"]
    inside = pc.is_in(ids, value_set=pa.array(sorted(wanted), ids.type))
    return storage.read_table(shard).filter(inside) if pc.any(inside).as_py() else pa.table({"id": ids[:0]})


def _with_texts(folder: str, rows: list[dict]) -> list[dict]:
    columns = {name: name.removesuffix("ids") + "tokens" for name in ("prompt_ids", *(f"{b}_ids" for b in BRANCHES))}
    columns["input_ids"] = "tokens"
    # What generate and pair write reads better as it is. Other rows have columns of their own beside those kept of it.
    if not rows or "prompt" in rows[0] and any(rows[0].keys() <= names for names in WRITTEN_AS_TEXT):
        return rows
    texts = _texts(folder)
    return [
        row | {target: [texts.get(token) or UNKNOWN for token in row[name]] for name, target in columns.items()
               if row.get(name) is not None}
        for row in rows
    ]  # fmt: skip


def _texts(folder: str) -> dict[int, str]:
    """How each token id reads."""
    uri = storage.join(folder, "token_classes.parquet")
    if storage.exists(uri):
        table = storage.read_table(uri, ["token_id", "text"])
    else:
        from alphatoken.token_classes import model_token_classes  # imports transformers

        run = _run_of(folder)
        if run.get("stage") == "export":
            return _texts(run["input"])
        settings = run.get("config", {})
        if not settings.get("model"):
            raise UserError(f"{folder} has no token_classes.parquet, and no run.json that names a model")
        table = model_token_classes(settings["model"], bool(settings.get("trust_remote_code")))
    return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _run_of(folder: str) -> dict:
    """The run.json or manifest.json of a folder, or of one above it; empty where there is none."""
    for _ in range(LEVELS):
        for name in RUN_FILES:
            uri = storage.join(folder, name)
            if storage.exists(uri):
                return storage.read_json(uri)
        folder = dirname(folder.rstrip("/"))
    return {}


def _made(folder: str) -> str:
    """Where to look instead, of a folder that `export` wrote."""
    source = _run_of(folder).get("input")
    return f"; look at {source}, which it was made from" if source else ""


def _not_there(folder: str, ids: list[str]) -> str:
    """One sentence: what is missing, why if that is known, and what ids look like."""
    place = storage.join(folder, "quarantine")
    for name in storage.list_names(place):
        if not name.endswith(".parquet"):
            continue
        for row in storage.read_table(storage.join(place, name), ["id", "reason"]).to_pylist():
            if row["id"] in ids:
                return f"{folder} has no row with id {row['id']}: it is in quarantine ({row['reason']})"
    first = storage.read_table(_shards(folder)[0], ["id"])["id"][:SHOWN].to_pylist()
    return f"{folder} has no row with id {', '.join(ids)}; its first ids are {', '.join(map(str, first))}"
