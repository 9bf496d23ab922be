"""The validation direction of a checkpoint: `alphatoken direction --model M --validation V --output D`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/direction.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import DirectionConfig
from jobs import cli

CONFIG = DirectionConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _direction, argv, show=cli.show_tensor_file, prog="alphatoken direction")


def _direction(config: DirectionConfig) -> dict:
    from alphatoken.row_count import count_rows
    from alphatoken.targets import validation_files
    from jobs.progress import progress_bar
    from pipelines.direction import VALIDATION_ROWS, run_direction  # imports Ray and torch: not before the arguments

    with progress_bar("rows") as bar:
        if not bar.drawn:
            return run_direction(config)
        total = count_rows(validation_files(config.validation))
        return run_direction(
            config, lambda what, done: bar.update(what, done, total if what == VALIDATION_ROWS else None)
        )


if __name__ == "__main__":
    sys.exit(main())
