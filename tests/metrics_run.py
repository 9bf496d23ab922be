"""A program of its own for test_metrics.py: every counted stage on a private Ray, then what its metrics endpoint says.

Arguments: model, data, output folder. Prints one line of JSON: what each stage returned, and the lines of the endpoint.
"""

import json
import os
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112 (Ray's own name; before Ray starts)


def lines() -> list[str]:
    import ray

    if not ray.is_initialized():
        return []
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith("ray_alphatoken_")]


def watch(gauges: set[str], stop: threading.Event) -> None:
    """Gauges go with the worker that set them, so they are looked at all the time."""
    while not stop.wait(0.3):
        with suppress(Exception):  # Ray is not there yet
            gauges |= {line for line in lines() if "tokens_per_second" in line or "kept_fraction" in line}


def main(model: str, data: str, output: str) -> None:
    from alphatoken.config import DirectionConfig, ScoreConfig
    from alphatoken.fisher_config import FisherConfig
    from alphatoken.mask_config import MaskConfig
    from alphatoken.rounds_config import RoundsConfig
    from alphatoken.train_config import TrainConfig
    from pipelines.direction import run_direction
    from pipelines.fisher import run_fisher
    from pipelines.mask import run_mask
    from pipelines.rounds import run_rounds
    from pipelines.score import run_score
    from pipelines.train import run_train

    gauges: set[str] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(gauges, stop))
    watcher.start()
    try:
        scored = run_score(
            ScoreConfig(model=model, data=[data], estimator="loss", output=f"{output}/scored", shard_tokens=400)
        )
        masked = run_mask(MaskConfig(input=f"{output}/scored", output=f"{output}/masked", keep_fraction=0.5))
        good = f"{output}/good.jsonl"
        lines_of_data = Path(data).read_text().splitlines(keepends=True)
        Path(good).write_text("".join(lines_of_data[:12]))
        direction = run_direction(
            DirectionConfig(model=model, validation=[good], parameters="all-linear", output=f"{output}/d.safetensors")
        )
        fisher = run_fisher(
            FisherConfig(
                model=model, prompts=[good], output=f"{output}/f.safetensors", engine="transformers", max_new_tokens=8
            )
        )
        steps = {"model": model, "max_steps": 4, "per_device_batch_size": 2, "max_length": 64, "logging_steps": 1}
        trained = run_train(TrainConfig(data=[f"{output}/masked"], output=f"{output}/trained", **steps))
        rounds = run_rounds(
            RoundsConfig(
                data=[good], validation=[good], output=f"{output}/rounds", plain_steps=0, refresh_every=2,
                keep_fraction=0.5, rule="share", preconditioner="none", **steps,
            )
        )
        time.sleep(2)  # some reports
    finally:
        stop.set()
        watcher.join()
    stages = {"score": scored, "mask": masked, "direction": direction, "fisher": fisher, "train": trained}
    print(json.dumps(stages | {"rounds": rounds, "lines": lines(), "gauges": sorted(gauges)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
