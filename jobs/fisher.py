"""The diagonal Fisher of the reference model: `alphatoken fisher --model R --prompts P --output F`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/fisher.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.fisher_config import FisherConfig
from jobs import cli

CONFIG = FisherConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _fisher, argv, show=cli.show_tensor_file, prog="alphatoken fisher")


def _fisher(config: FisherConfig) -> dict:
    from alphatoken.row_count import count_rows
    from jobs.progress import progress_bar
    from pipelines.fisher import run_fisher  # imports Ray and torch: not before the arguments are right

    with progress_bar("prompts") as bar:
        if not bar.drawn:
            return run_fisher(config)
        total = min(config.num_prompts, count_rows(config.prompts) or config.num_prompts)
        return run_fisher(config, lambda what, done: bar.update(what, done, total))


if __name__ == "__main__":
    sys.exit(main())
