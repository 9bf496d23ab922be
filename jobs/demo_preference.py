"""`alphatoken demo --preference`: prompts with checkable answers to a DPO-trained checkpoint, on the embedded model.

    generate -> pair (verifier number) -> score -> mask -> train
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphatoken.config import EMBEDDED_MODEL, DemoConfig, ScoreConfig, embedded_data
from alphatoken.generate_config import GenerateConfig, PairConfig
from alphatoken.mask_config import MaskConfig
from alphatoken.train_config import TrainConfig

SAMPLES, TEMPERATURE, MAX_NEW_TOKENS = 6, 0.8, 48
SHOWN_PAIRS = 2
# Enough to see the flow in minutes on two cores.
TRAINING = {"per_device_batch_size": 2, "learning_rate": 5e-6, "dtype": "bfloat16", "logging_steps": 2}


def run_preference(config: DemoConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole chain; returns counts, folders and pairs to look at."""
    from alphatoken import storage
    from jobs.generate import generate_with_progress
    from jobs.score import score_with_progress
    from jobs.train import training_bar
    from pipelines.mask import run_mask
    from pipelines.pair import run_pair
    from pipelines.train import run_train

    base = Path(config.output)
    folders = {name: str(base / name) for name in ("responses", "pairs", "scored_pairs", "masked_pairs", "dpo")}
    again = {"overwrite": config.overwrite}
    say(f"1. {SAMPLES} responses to each prompt, sampled from the model as it is.")
    generated = generate_with_progress(
        GenerateConfig(
            model=EMBEDDED_MODEL,
            prompts=[str(embedded_data() / "sums_prompts.jsonl")],
            output=folders["responses"],
            samples=SAMPLES,
            temperature=TEMPERATURE,
            max_new_tokens=MAX_NEW_TOKENS,
            **again,
        )
    )
    say("2. A right response against a wrong one, by the final number.")
    paired = run_pair(PairConfig(input=folders["responses"], output=folders["pairs"], judge="verifier", **again))
    say("3. How much is each token of both worth? DPO values, and the reference's log-probabilities.")
    scored = score_with_progress(
        ScoreConfig(
            model=EMBEDDED_MODEL,
            data=[folders["pairs"]],
            validation=[str(embedded_data() / "sums_validation.jsonl")],
            output=folders["scored_pairs"],
            **again,
        ),
    )
    masked = run_mask(MaskConfig(input=folders["scored_pairs"], output=folders["masked_pairs"], **again))
    result = {
        "engine": generated["engine"],
        "folders": folders,
        "counts": {"responses": generated["counts"], "pairs": paired["counts"], "masked": masked["counts"]},
        "seconds": {
            "generate": generated["seconds"],
            "pair": paired["seconds"],
            "score": scored["seconds"],
            "mask": masked["seconds"],
        },
        "pairs": storage.read_table(storage.list_shards(folders["pairs"])[0]).slice(0, SHOWN_PAIRS).to_pylist(),
    }
    if not config.steps:
        return result
    say("4. DPO on the kept tokens, without a reference model: its log-probabilities are in the data.")
    training = TrainConfig(
        objective="dpo",
        data=folders["masked_pairs"],
        model=EMBEDDED_MODEL,
        output=folders["dpo"],
        max_steps=min(config.steps, max(1, masked["counts"]["rows_out"] // 2)),
        **TRAINING,
        **again,
    )
    with training_bar(training) as progress:
        trained = run_train(training, progress)
    result["seconds"]["train"] = trained["seconds"]
    return result | {"model": f"{folders['dpo']}/model", "training": trained["counts"]}


def show_preference(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, markup=False, highlight=False)
    for pair in result["pairs"]:
        console.rule(pair["id"], align="left")
        console.print(pair["messages"][-1]["content"], style="dim")
        console.print(f"chosen:   {pair['chosen']}", style="green")
        console.print(f"rejected: {pair['rejected']}", style="red")
    counts = result["counts"]
    console.rule()
    responses, pairs, masked = counts["responses"], counts["pairs"], counts["masked"]
    console.print(f"{responses['rows_out']:,} responses by {result['engine']}, {pairs['rows_out']:,} pairs")
    for reason, number in pairs["quarantine_reasons"].items():
        console.print(f"  {number:,} prompts set aside: {reason}")
    console.print(f"kept {masked['kept_fraction']:.1%} of {masked['response_tokens']:,} tokens of both branches")
    console.print(f"token-masked pairs: {result['folders']['masked_pairs']}")
    if "model" in result:
        console.print(f"DPO-trained checkpoint ({result['training']['steps']} steps): {result['model']}")
