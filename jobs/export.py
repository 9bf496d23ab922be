"""Masked data for another training stack: `alphatoken export --input MASKED --to axolotl --output FOLDER`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/export.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import ExportConfig
from jobs import cli

CONFIG = ExportConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _export, cli.folder_first(argv), show=_show, prog="alphatoken export")


def _export(config: ExportConfig) -> dict:
    from jobs.progress import progress_bar
    from pipelines.export import run_export

    with progress_bar("shards") as bar:
        return run_export(config, lambda done, total: bar.update("exporting shards", done, total))


def _show(config: ExportConfig, manifest: dict) -> None:
    rows = manifest["counts"]["rows_out"]
    sys.stdout.write(f"{config.output}: {rows:,} rows for {config.to}, used so (also in its README.md):\n")
    sys.stdout.write(manifest["snippet"])
    if manifest["note"]:
        sys.stdout.write(f"\n{manifest['note']}\n")


if __name__ == "__main__":
    sys.exit(main())
