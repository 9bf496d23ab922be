"""Look at rows of a SCORED or MASKED folder in the terminal: `alphatoken show FOLDER --row ID`.

Green: training on the token lowers the validation loss. Red: it raises it. Struck out: dropped by the mask.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/show.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel, ConfigDict, Field

from alphatoken.errors import UserError
from jobs import cli

STRONGEST = 0.9  # quantile of absolute value in the row that gets the full colour


class ShowConfig(BaseModel):
    """Rows of a scored or masked data set, token by token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = Field(description="folder that `alphatoken score` or `alphatoken mask` wrote")
    row: list[str] = Field([], description="ids of rows to show; default: the first ones")
    limit: int = Field(2, ge=1, description="how many rows to show where no ids are given")


def main(argv: list[str] | None = None) -> int:
    arguments = cli.folder_first(argv)
    return cli.run(ShowConfig, _rows, arguments, show=lambda config, rows: print_rows(rows), prog="alphatoken show")


def _rows(config: ShowConfig) -> dict:
    return {"rows": read_rows(config.input, config.row, config.limit)}


def read_rows(folder: str, ids: list[str], limit: int) -> list[dict]:
    """Rows with their tokens' texts. Raises UserError for an id that is not there."""
    from alphatoken import storage

    classes = storage.read_table(storage.join(folder, "token_classes.parquet"), ["token_id", "text"])
    texts = dict(zip(classes["token_id"].to_pylist(), classes["text"].to_pylist(), strict=True))
    wanted, found = set(ids), []
    for shard in storage.list_shards(folder):
        for row in storage.read_table(shard).to_pylist():
            if row["id"] in wanted or not ids:
                found.append(row | {"tokens": [texts.get(token, "?") for token in row["input_ids"]]})
                wanted.discard(row["id"])
            if (not ids and len(found) >= limit) or (ids and not wanted):
                return found
    if wanted:
        raise UserError(f"{folder} has no row with id {', '.join(sorted(wanted))}")
    return found


def print_rows(result: dict) -> None:
    """Each row in colour."""
    from rich.console import Console

    console = Console()
    for row in result["rows"]:
        kept = ""
        if "labels" in row:
            count = sum(label >= 0 for label in row["labels"])
            kept = f", kept {count} of {row['num_response_tokens']} response tokens"
        console.rule(f"{row['id']}{kept}", align="left")
        console.print(coloured(row))


def coloured(row: dict):
    """A rich Text: the prompt dim, response tokens by value, dropped tokens struck out."""
    from rich.text import Text

    values = row.get("value") or row["adaptation"]
    sizes = sorted(abs(value) for value, mask in zip(values, row["response_mask"], strict=True) if mask)
    scale = sizes[int(STRONGEST * (len(sizes) - 1))] or 1.0
    text = Text()
    labels = row.get("labels") or row["input_ids"]
    for token, value, mask, label in zip(row["tokens"], values, row["response_mask"], labels, strict=True):
        text.append(token, style=_style(value / scale, label >= 0) if mask else "dim")
    return text


def _style(strength: float, kept: bool) -> str:
    share = min(1.0, abs(strength))
    faint = round(215 * (1 - share))
    colour = f"rgb({faint},{180 + faint // 6},{faint})" if strength >= 0 else f"rgb({200 + faint // 8},{faint},{faint})"
    return colour if kept else f"{colour} strike"


if __name__ == "__main__":
    sys.exit(main())
