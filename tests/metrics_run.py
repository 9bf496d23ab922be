"""A program of its own for test_metrics.py: score and mask on a private Ray, then what its metrics endpoint says.

Arguments: model, data, output folder. Prints one line of JSON: both manifests, and the lines of the endpoint.
"""

import json
import os
import sys
import threading
import time
import urllib.request
from contextlib import suppress

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
    from alphatoken.config import MaskConfig, ScoreConfig
    from pipelines.mask import run_mask
    from pipelines.score import run_score

    gauges: set[str] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(gauges, stop))
    watcher.start()
    try:
        scored = run_score(
            ScoreConfig(model=model, data=[data], estimator="loss", output=f"{output}/scored", shard_tokens=400)
        )
        masked = run_mask(MaskConfig(input=f"{output}/scored", output=f"{output}/masked", keep_fraction=0.5))
        time.sleep(2)  # some reports
    finally:
        stop.set()
        watcher.join()
    print(json.dumps({"score": scored, "mask": masked, "lines": lines(), "gauges": sorted(gauges)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
