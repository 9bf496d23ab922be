"""`ray job submit --working-dir . -- python jobs/score.py ...` against a running cluster: a real local head.

The same over two nodes and storage by URI is in test_cluster_storage.py.
"""

import json

import pytest
from ray_nodes import RayNodes


@pytest.mark.slow
def test_a_submitted_score_job(tiny_checkpoint, tmp_path):
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "scored"
    with RayNodes() as nodes:
        nodes.start_head("--num-cpus=4")
        done = nodes.submit(
            "python", "jobs/score.py", "--model", tiny_checkpoint, "--data", str(data), "--validation", str(data),
            "--output", str(output), working_dir=".",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["counts"]["rows_out"] == 8


@pytest.mark.full
def test_nobody_submits_without_the_token():
    with RayNodes() as nodes:
        nodes.start_head("--num-cpus=1")
        nodes.token = "of another cluster"
        done = nodes.submit("true")
        assert done.returncode != 0
        assert "token" in (done.stdout + done.stderr).lower()
