"""What `alphatoken plan --device cpu` predicts for scoring a few dozen rows, against what scoring them takes.

    python benchmarks/plan_check.py [--rows 48] [--json FILE]

Per estimator: seconds in the scoring actor of the pipeline, seconds of making the direction, and the peak memory of
both above a process that has imported everything, each in a process of its own. `implied utilization` is the share of
the measured matrix product's speed that would have made the prediction right: what `--utilization` should be here.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import in_own_process, peak_mb_of, print_table, rows_parser, write_result

from alphatoken.config import DataOptions, ScoreConfig
from alphatoken.model import load_model
from alphatoken.plan_config import PlanConfig
from alphatoken.plan_score import plan_score
from alphatoken.scoring import default_parameters
from alphatoken.sources import plan_units
from pipelines.direction import make_direction
from pipelines.encode import EncodePlan, encode_units
from pipelines.score import run_score, shard_tokens
from pipelines.scorer import ScorePlan, Scorer

LINES: dict[str, dict[str, Any]] = {
    "loss": {"estimator": "loss"},
    "exact, all-linear, central difference": {"method": "central"},
    "exact, all-linear, forward mode": {"method": "forward"},
    "exact, K = 3, forward mode": {"method": "forward", "parameters": "last-layers:3"},
    "value_propagation, K = 3": {"estimator": "value_propagation"},
}


def score_here(config: ScoreConfig, direction: str | None) -> dict:
    """Peak memory of an actor, from before it loads the model."""
    units = plan_units(config.data)
    options = DataOptions(**config.model_dump(include=set(DataOptions.model_fields)))
    encoded = encode_units({"unit": np.arange(len(units))}, units, EncodePlan(config.model, False, options))
    table = pa.concat_tables(list(encoded))
    plan = ScorePlan(config, config.parameters, [], direction, f"{config.output}-again")
    peak = peak_mb_of(lambda: Scorer(plan, torch.get_num_threads())(table))
    return {"bytes": peak * 2**20}


def make_direction_here(config: ScoreConfig, path: str) -> dict:
    """Peak memory, from before the model is loaded, and seconds of the direction alone."""
    seconds = []

    def make() -> None:
        scoring = load_model(config.model, config.dtype, torch.device("cpu"))
        parameters = config.parameters or default_parameters(config.estimator)
        started = time.perf_counter()
        make_direction(scoring, config, parameters, config.positions_for(config.estimator), path)
        seconds.append(time.perf_counter() - started)

    return {"bytes": peak_mb_of(make) * 2**20, "seconds": seconds[0]}


def check(settings: dict[str, Any], folder: str) -> dict:
    """Predicted and measured, of one estimator."""
    planned = PlanConfig(device="cpu", output=f"{folder}/scored", **settings)
    config = planned.score_config()
    units = plan_units(config.data)
    plan = plan_score(planned, units, shard_tokens(config, units))
    manifest = run_score(config)
    valued = config.estimator in ("exact", "value_propagation")
    made = in_own_process(make_direction_here, config, f"{folder}/again.safetensors") if valued else {}
    actor = in_own_process(score_here, config, f"{folder}/scored/direction.safetensors" if valued else None)
    hours = plan["time"]
    seconds = manifest["counts"]["scoring_seconds"]
    return {
        "predicted_seconds": hours["scoring_device_hours"] * 3600,
        "measured_seconds": seconds,
        "implied_utilization": hours["utilization"] * hours["scoring_device_hours"] * 3600 / seconds,
        "predicted_bytes": plan["memory"]["actor"],
        "measured_bytes": actor["bytes"],
        "direction": {
            "predicted_seconds": hours["direction_hours"] * 3600,
            "measured_seconds": made["seconds"],  # with its checks and the search for a central step
            "predicted_bytes": plan["memory"]["making_the_direction"],
            "measured_bytes": made["bytes"],
        }
        if valued
        else None,
        "pipeline_seconds": manifest["seconds"],
        "plan": {name: part for name, part in plan.items() if name != "command"},  # which names this machine's folders
    }


def compared(line: dict) -> list[str]:
    """Cells of a table: predicted, measured and their ratio, of time and of memory."""
    cells = []
    for name, unit, digits in (("seconds", 1, 1), ("bytes", 1e9, 2)):
        predicted, measured = line[f"predicted_{name}"] / unit, line[f"measured_{name}"] / unit
        cells += [f"{predicted:.{digits}f}", f"{measured:.{digits}f}", f"{predicted / measured:.2f}"]
    return cells


def main() -> None:
    parser = rows_parser(__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(Path(arguments.data).read_text().splitlines(keepends=True)[: arguments.rows]))
        shared = {"model": arguments.model, "data": [str(data)], "dtype": arguments.dtype}
        for number, (name, settings) in enumerate(LINES.items()):
            if arguments.dtype == "bfloat16" and settings.get("method") == "central":
                continue
            valued = {} if settings.get("estimator") == "loss" else {"validation": [arguments.validation]}
            results[name] = check(shared | valued | settings, f"{folder}/{number}")
    columns = ["seconds predicted", "measured", "ratio", "GB predicted", "measured", "ratio"]
    print_table(
        f"scoring {arguments.rows} rows, {arguments.dtype}",
        ["", *columns, "implied utilization"],
        [[name, *compared(line), f"{line['implied_utilization']:.2f}"] for name, line in results.items()],
    )
    print_table(
        "making the direction",
        ["", *columns],
        [[name, *compared(line["direction"])] for name, line in results.items() if line["direction"]],
    )
    write_result(arguments.json, {"model": arguments.model, "rows": arguments.rows, "results": results})


if __name__ == "__main__":
    main()
