"""One HTML page about a folder of values or masks: `alphatoken report FOLDER --output report.html`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/report.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel, ConfigDict, Field

from jobs import cli


class ReportConfig(BaseModel):
    """A self-contained page of sampled rows, with sliders that mask them again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = Field(description="folder that `alphatoken score` or `mask` wrote; may come first, without --input")
    output: str = Field("report.html", description="the page, one HTML file")
    rows: int = Field(200, ge=1, description="rows (or pairs) to draw; the page's numbers are about these")
    seed: int = Field(0, ge=0, description="which rows are drawn")
    group_by: str | None = Field(
        None, description="column to count kept tokens by (see `score --keep-columns`); default: the input file"
    )
    compare: str | None = Field(
        None, description="another folder, scored from the same data with another estimator, to compare values with"
    )


CONFIG = ReportConfig


def main(argv: list[str] | None = None) -> int:
    arguments = cli.folder_first(argv)
    return cli.run(CONFIG, _report, arguments, show=_show, prog="alphatoken report")


def _report(config: ReportConfig) -> dict:
    from alphatoken import storage
    from alphatoken.report import report_page
    from alphatoken.report_data import report_data

    data = report_data(config.input, config.rows, config.seed, config.group_by, config.compare)
    page = report_page(data, config.input).encode()
    storage.write_bytes(page, storage.absolute(config.output))
    return {"output": config.output, "rows": len(data["rows"]), "bytes": len(page)}


def _show(config: ReportConfig, result: dict) -> None:
    size = f"{result['rows']} rows, {result['bytes'] / 1e6:.2f} MB"
    sys.stdout.write(f"{result['output']}: {size}; open it in a browser\n")


if __name__ == "__main__":
    sys.exit(main())
