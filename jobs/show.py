"""Look at rows of any folder that a stage wrote, in the terminal: `alphatoken show FOLDER --row ID`.

Green: training on the token lowers the validation loss. Red: it raises it. Struck out: dropped by the mask; where
stdout is no terminal, dropped tokens stand in [-brackets-].
"""

import re
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # `python jobs/show.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel, ConfigDict, Field

from jobs import cli

if TYPE_CHECKING:
    from rich.text import Text

    from alphatoken.row_view import Part, Token

STRONGEST = 0.9  # quantile of absolute value in the response that gets the full colour
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks


class ShowConfig(BaseModel):
    """Rows of a scored or masked data set, token by token; also of responses, pairs and windows of rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = Field(
        description="folder that `alphatoken score`, `mask`, `generate` or `pair` wrote, or a window of rounds "
        "(OUTPUT/windows/NUMBER); may come first, without --input"
    )
    row: list[str] = Field([], description="ids of rows to show; default: the first ones")
    limit: int = Field(2, ge=1, description="how many rows to show where no ids are given")


CONFIG = ShowConfig


def main(argv: list[str] | None = None) -> int:
    arguments = cli.folder_first(argv)
    return cli.run(CONFIG, _rows, arguments, show=lambda config, rows: print_rows(rows), prog="alphatoken show")


def _rows(config: ShowConfig) -> dict:
    from alphatoken.row_view import read_rows

    return {"rows": read_rows(config.input, config.row, config.limit)}


def print_rows(result: dict) -> None:
    """Each row, a text below the other: in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from alphatoken.row_view import parts

    console = Console(highlight=False)
    plain = not console.is_terminal or console.is_dumb_terminal
    for row in result["rows"]:
        console.print(Text(visible(f"── {row['id']}{_about(row)}"), style="bold"), soft_wrap=True)
        for part in parts(row):
            if part.name:
                console.print(Text(f"{part.name}{_kept(part)}:", style="bold"))
            console.print(Text(marked(part)) if plain else coloured(part), soft_wrap=plain)


def marked(part: "Part") -> str:
    """The text, with dropped tokens in [-brackets-]."""
    runs = groupby(part.tokens, key=lambda token: token.kept or not token.inside)
    texts = ((kept, "".join(visible(token.text) for token in run)) for kept, run in runs)
    return "".join(text if kept else f"[-{text}-]" for kept, text in texts)


def coloured(part: "Part") -> "Text":
    """The prompt dim, response tokens by value, dropped tokens struck out."""
    from rich.text import Text

    sizes = sorted(abs(token.value) for token in part.response if token.value is not None)
    scale = (sizes[int(STRONGEST * (len(sizes) - 1))] if sizes else 0.0) or 1.0
    text = Text()
    for token in part.tokens:
        text.append(visible(token.text), style=_style(token, scale) if token.inside else "dim")
    return text


def visible(text: str) -> str:
    """Control characters as escapes: what a row holds must not steer the terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _style(token: "Token", scale: float) -> str:
    struck = "" if token.kept else "strike"
    if token.value is None:
        return struck
    strength = token.value / scale
    faint = round(215 * (1 - min(1.0, abs(strength))))
    green, red = f"rgb({faint},{180 + faint // 6},{faint})", f"rgb({200 + faint // 8},{faint},{faint})"
    return f"{green if strength >= 0 else red} {struck}".rstrip()


def _kept(part: "Part") -> str:
    """How much of a response is left, where something was dropped."""
    response = part.response
    count = sum(token.kept for token in response)
    return "" if count == len(response) else f", kept {count} of {len(response)} tokens"


def _about(row: dict[str, Any]) -> str:
    if row.get("sample") is not None:
        return f", sample {row['sample']}"
    if "labels" not in row:
        return ""
    kept = sum(label >= 0 for label in row["labels"])
    return f", kept {kept} of {sum(row['response_mask'])} response tokens"


if __name__ == "__main__":
    sys.exit(main())
