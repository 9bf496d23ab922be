"""Which scored tokens are kept: `alphatoken mask --input SCORED --output MASKED`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/mask.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.mask_config import MaskConfig
from jobs import cli

CONFIG = MaskConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _mask, argv, show=show_mask, prog="alphatoken mask")


def _mask(config: MaskConfig) -> dict:
    from jobs.progress import progress_bar
    from pipelines.mask import run_mask  # imports Ray: not before the arguments are right

    with progress_bar("shards") as bar:
        return run_mask(config, lambda done, total: bar.update("masking shards", done, total))


def show_mask(config: MaskConfig, manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    counts, rule = manifest["counts"], manifest.get("rule", "share")
    table = Table(show_header=False, box=None)
    table.add_row("token-masked data set", config.output)
    table.add_row("rule", rule + ("" if rule == "share" else _bounds(manifest["bounds"], config.protect)))
    table.add_row("kept", f"{counts['kept_fraction']:.1%} of {counts['response_tokens']:,} response tokens")
    table.add_row("rows", f"{counts['rows_out']:,} of {counts['rows_in']:,}")
    for name in ("rows_dropped_sequences", "rows_quarantined"):
        if counts[name]:
            tokens = counts.get("dropped_row_tokens") if name == "rows_dropped_sequences" else None
            of_them = f"{tokens:,} of the response tokens; " if tokens else ""
            table.add_row(name.replace("_", " "), f"{counts[name]:,} ({of_them}reasons in quarantine/)")
    Console(soft_wrap=True, markup=False).print(table)


def _bounds(found: dict, protected: list[str]) -> str:
    """In words."""
    bounded = [
        f"{name} above {bound:.2f}" + (" (protected)" if name in protected else "")
        for name, bound in found["tokens"].items()
        if bound is not None
    ]
    rows = "" if found["row"] is None else f"; rows above {found['row']:.2f} on average"
    return f"; losses in excess: {', '.join(bounded) or 'of no token class'}{rows}"


if __name__ == "__main__":
    sys.exit(main())
