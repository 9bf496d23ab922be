"""The validation direction of a checkpoint: `alphatoken direction --model M --validation V --output D`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/direction.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.config import DirectionConfig
from jobs import cli


def main(argv: list[str] | None = None) -> int:
    return cli.run(DirectionConfig, _direction, argv, show=cli.show_tensor_file, prog="alphatoken direction")


def _direction(config: DirectionConfig) -> dict:
    from pipelines.direction import run_direction  # imports Ray and torch: not before the arguments are right

    return run_direction(config)


if __name__ == "__main__":
    sys.exit(main())
