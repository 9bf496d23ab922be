"""What Prometheus reads of a run is what its manifest says."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.metrics import reason_class, time_per_worker

TESTS = Path(__file__).parent
ROWS = 40


@pytest.mark.full
@pytest.mark.slow
def test_the_endpoint_of_a_node_has_the_counts_of_the_manifest(tiny_checkpoint: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(ROWS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"input_ids": [1, 9999]}\n{bad json\n')
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, TESTS / "metrics_run.py", tiny_checkpoint, data, tmp_path],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])

    totals: Counter = Counter()
    workers = defaultdict(set)
    for family in text_string_to_metric_families("\n".join(said["lines"]) + "\n"):
        for sample in family.samples:
            tag = sample.labels.get("kind") or sample.labels.get("reason")
            name = sample.name.removeprefix("ray_alphatoken_").removesuffix("_total")
            totals[name, sample.labels["stage"], tag] += sample.value
            workers[sample.labels["stage"]].add(sample.labels["WorkerId"])
    for stage in ("score", "mask"):
        counts = said[stage]["counts"]
        assert totals["rows", stage, "in"] == counts["rows_in"]
        assert totals["rows", stage, "out"] == counts["rows_out"] == ROWS
        assert totals["tokens", stage, "response"] == counts["response_tokens"]
        shards = sum(worker["shards"] for worker in said[stage]["workers"])
        assert totals["block_seconds_count", stage, None] == shards
        seconds = sum(worker["seconds"] for worker in said[stage]["workers"])
        assert totals["busy_seconds", stage, None] == pytest.approx(seconds, rel=0.01, abs=0.01) and seconds > 0
        assert any("tokens_per_second{" in line and f'stage="{stage}"' in line for line in said["gauges"])
        assert len(workers[stage]) >= len(said[stage]["workers"])
    idle = sum(worker["idle_seconds"] for worker in said["score"]["workers"])
    assert totals["idle_seconds", "score", None] == pytest.approx(idle, rel=0.01, abs=0.01) and idle > 0
    assert totals["tokens", "score", "all"] == said["score"]["counts"]["tokens"]
    assert totals["rows", "score", "quarantined"] == said["score"]["counts"]["rows_quarantined"] == 2
    reasons = {tag: value for (name, _, tag), value in totals.items() if name == "quarantined"}
    assert sum(reasons.values()) == 2
    assert set(reasons) == {reason_class(reason) for reason in said["score"]["counts"]["quarantine_reasons"]}
    assert totals["tokens", "mask", "kept"] == said["mask"]["counts"]["kept_tokens"]
    assert any("kept_fraction{" in line for line in said["gauges"])
    for stage in ("direction", "fisher"):
        assert totals["rows", stage, "out"] == said[stage]["num_rows"] > 0
        assert totals["tokens", stage, "response"] == said[stage]["num_tokens"] > 0
    assert totals["steps", "train", None] == said["train"]["counts"]["steps"] == 4
    assert totals["tokens", "train", "all"] > totals["tokens", "mask", "response"] / 10
    assert totals["steps", "rounds", None] == said["rounds"]["counts"]["steps"] == 4
    assert totals["rows", "rounds", "out"] == 8 and totals["tokens", "rounds", "kept"] > 0
    assert totals["busy_seconds", "rounds", None] > 0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("the response is empty", "the response is empty"),
        (
            "token id 9999 is not in the model's vocabulary of 61",
            "token id ... is not in the model's vocabulary of ...",
        ),
        ("the row has 4,096 tokens, more than max_length 2048", "the row has ... tokens, more than max_length ..."),
        ("the chat template refuses the conversation: no system role", "the chat template refuses the conversation"),
        ("messages[3] has no role", "messages... has no role"),
        ("x" * 500, "x" * 80),
    ],
)
def test_reasons_become_few(reason: str, expected: str) -> None:
    assert reason_class(reason) == expected


def test_time_per_worker() -> None:
    def record(worker: str, rows: int, seconds: float) -> dict:
        return {"worker": worker, "seconds": seconds, "counts": {"rows_in": rows, "response_tokens": 10 * rows}}

    found = time_per_worker([record("a", 1, 0.5), record("b", 2, 2.0), record("a", 3, 0.25), {"counts": {}}])
    assert [(own["worker"], own["shards"], own["rows"], own["seconds"]) for own in found] == [
        ("b", 1, 2, 2.0), ("a", 2, 4, 0.75)
    ]  # fmt: skip
    assert found[1]["response_tokens"] == 40
    assert "idle_seconds" not in found[0]  # nothing takes turns there


def test_idle_time_per_worker() -> None:
    counts = {"rows_in": 1, "idle_seconds": 0.5}
    found = time_per_worker([{"worker": "a", "seconds": 1.0, "counts": counts}] * 3)
    assert found[0]["idle_seconds"] == 1.5
