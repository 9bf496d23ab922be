"""A verifier of your own: what decides which response is chosen and which is rejected.

    python examples/custom_verifier.py                                     # pairs from the embedded sums

The same from the command line, in the folder where this file is:

    alphatoken pair --input RESPONSES --output PAIRS --judge verifier --verifier custom_verifier:short_and_right
"""

import argparse
import logging
import os
import re
from pathlib import Path


def short_and_right(response: str, answer: str) -> float:
    """A score, the higher the better: right answers first, and the shorter of two right ones. True and False do, too.

    What it raises sets the prompt aside with that text as the reason.
    """
    numbers = re.findall(r"-?\d+", response)
    right = bool(numbers) and numbers[-1] == answer.strip()
    return right + 1 / (1 + len(response.split())) if right else 0.0


def main() -> None:
    # Here, not above: workers import this file for the function alone.
    from alphatoken.config import EMBEDDED_MODEL, embedded_data
    from alphatoken.generate_config import GenerateConfig, PairConfig
    from pipelines.generate import run_generate
    from pipelines.pair import run_pair

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--prompts", default=str(embedded_data() / "sums_prompts.jsonl"), help="with an answer each")
    parser.add_argument("--limit", type=int, default=8, help="prompts used")
    parser.add_argument("--output", default="runs/example-verifier", help="folder for everything that is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, prompts = Path(arguments.output).absolute(), Path(arguments.prompts).absolute()
    # Modules of verifiers are looked for where the command runs, in workers as well.
    os.chdir(Path(__file__).resolve().parent)

    run_generate(
        GenerateConfig(
            model=arguments.model,
            prompts=[str(prompts)],
            output=str(folder / "responses"),
            samples=4,
            max_new_tokens=32,
            limit=arguments.limit,
            engine="transformers",
        )
    )
    paired = run_pair(
        PairConfig(
            input=str(folder / "responses"),
            output=str(folder / "pairs"),
            judge="verifier",
            verifier="custom_verifier:short_and_right",
        )
    )
    counts = paired["counts"]
    print(f"{counts['rows_out']} pairs from {counts['prompts']} prompts: {folder / 'pairs'}")
    for reason, number in counts["quarantine_reasons"].items():
        print(f"  {number} prompts set aside: {reason}")


if __name__ == "__main__":
    main()
