"""Training in rounds: `alphatoken rounds --model M --data FILES --validation FILES --output OUT`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/rounds.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.rounds_config import RoundsConfig
from jobs import cli
from jobs.train import show_training, training_bar

CONFIG = RoundsConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _rounds, argv, show=show_training, prog="alphatoken rounds")


def _rounds(config: RoundsConfig) -> dict:
    from pipelines.rounds import run_rounds  # imports Ray and torch: not before the arguments are right

    with training_bar(config) as progress:
        return run_rounds(config, progress)


if __name__ == "__main__":
    sys.exit(main())
