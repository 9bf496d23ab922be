"""Sample responses, pair a right one with a wrong one, value and mask the tokens of both: `generate` to `mask`.

    python examples/preference_pairs.py                                    # embedded sums that a small model can do

`alphatoken train --objective dpo` then trains on OUTPUT/masked. Rows that have `chosen` and `rejected` already go to
`run_score` as they are, without the first two steps.
"""

import argparse
import logging
from pathlib import Path

from alphatoken.config import EMBEDDED_MODEL, ScoreConfig, embedded_data
from alphatoken.generate_config import GenerateConfig, PairConfig
from alphatoken.mask_config import MaskConfig
from pipelines.generate import run_generate
from pipelines.mask import run_mask
from pipelines.pair import run_pair
from pipelines.score import run_score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="folder or hub name")
    parser.add_argument("--prompts", default=str(embedded_data() / "sums_prompts.jsonl"), help="with an answer each")
    parser.add_argument("--validation", default=str(embedded_data() / "sums_validation.jsonl"))
    parser.add_argument("--limit", type=int, default=12, help="prompts used")
    parser.add_argument("--engine", default="transformers", help="vllm is quicker once it runs, and starts slowly")
    parser.add_argument("--output", default="runs/example-pairs", help="folder for everything that is written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folders = {name: str(Path(arguments.output, name)) for name in ("responses", "pairs", "scored", "masked")}

    # Several samples of each prompt: a pair needs a right one and a wrong one.
    run_generate(
        GenerateConfig(
            model=arguments.model,
            prompts=[arguments.prompts],
            output=folders["responses"],
            samples=6,
            temperature=0.8,
            max_new_tokens=32,
            limit=arguments.limit,
            engine=arguments.engine,
        )
    )
    # By the final number of the response. Prompts without a pair are set aside, with the reason.
    paired = run_pair(PairConfig(input=folders["responses"], output=folders["pairs"], judge="verifier"))
    # DPO's values: a rejected token is valuable where pushing it down helps. The reference's log-probabilities of both
    # responses are stored beside them, so training needs no reference model.
    run_score(
        ScoreConfig(
            model=arguments.model,
            data=[folders["pairs"]],
            validation=[arguments.validation],
            output=folders["scored"],
        )
    )
    masked = run_mask(MaskConfig(input=folders["scored"], output=folders["masked"]))

    print(f"{paired['counts']['rows_out']} pairs from {paired['counts']['prompts']} prompts")
    for reason, number in paired["counts"]["quarantine_reasons"].items():
        print(f"  {number} prompts set aside: {reason}")
    counts = masked["counts"]
    print(f"{counts['kept_tokens']} of {counts['response_tokens']} tokens of both responses kept: {folders['masked']}")


if __name__ == "__main__":
    main()
