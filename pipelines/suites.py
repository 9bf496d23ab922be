"""The standard suites: handed over to lm-eval, where it is installed."""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import ray

from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError
from alphatoken.evaluate_config import EvaluateConfig
from alphatoken.model import default_device, resolve_dtype
from pipelines.cluster import prepare_worker

BATCH_ROWS = 8


def check_installed() -> None:
    """Raises UserError without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs lm-eval, which is not installed: pip install 'lm_eval[hf]'")


@ray.remote
def run_suites(config: EvaluateConfig, model: str, threads: int) -> dict:
    """{task: {"metric,filter": value, "metric_stderr,filter": value}} from lm-eval, with its own code throughout."""
    prepare_worker(threads)
    import lm_eval

    device = default_device()
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(resolve_model(model)),
            "dtype": str(resolve_dtype(config.dtype, device)).removeprefix("torch."),
            "trust_remote_code": config.trust_remote_code,
        },
        tasks=config.lm_eval,
        limit=config.limit,
        batch_size=BATCH_ROWS,
        device=str(device),
    )
    return found["results"]


def suite_measures(models: list[str], tasks: dict[str, dict]) -> Iterator[dict]:
    """Lines of the table from {model: what run_suites returned}.

    lm-eval gives no rows, so the difference is taken as of independent samples: its error is rather too large.
    """
    if not tasks:
        return
    for task, first in tasks[models[0]].items():
        for key, value in first.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            pairs = [
                (_float(tasks[model][task].get(key)), _float(tasks[model][task].get(f"{metric}_stderr,{chosen}")))
                for model in models
            ]
            measure = metric if chosen == "none" else f"{metric} ({chosen})"
            values = [as_number(*pair) for pair in pairs]
            line: dict[str, Any] = {"kind": "lm-eval", "file": task, "measure": measure, "values": values}
            if len(pairs) == 2:
                (before, error_before), (after, error_after) = pairs
                line["difference"] = as_number(after - before, math.hypot(error_before, error_after))
            yield line


def _float(value: Any) -> float:
    """lm-eval says N/A where it has no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def as_number(value: float, error: float) -> dict:
    """As JSON, which has neither NaN nor infinity."""
    return {
        "value": value if math.isfinite(value) else None,
        "standard_error": error if math.isfinite(error) else None,
    }
