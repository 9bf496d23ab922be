"""The diagonal Fisher of the reference model: `alphatoken fisher --model R --prompts P --output F`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/fisher.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.fisher_config import FisherConfig
from jobs import cli


def main(argv: list[str] | None = None) -> int:
    return cli.run(FisherConfig, _fisher, argv, show=cli.show_tensor_file, prog="alphatoken fisher")


def _fisher(config: FisherConfig) -> dict:
    from pipelines.fisher import run_fisher  # imports Ray and torch: not before the arguments are right

    return run_fisher(config)


if __name__ == "__main__":
    sys.exit(main())
