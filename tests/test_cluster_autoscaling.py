"""From no GPU machine to as many as the actors ask for, and back: Ray's autoscaler with its fake machines."""

import json
import threading
import time
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID as HEAD_ID
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray_nodes import ROOT, RayNodes

ACTORS = 2
IDLE_SECONDS = 15
NOTHING_TO_INSTALL = (
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip


def autoscaling_config(gcs_address: str) -> dict:
    """A head without a GPU, and machines with one that exist as processes here."""
    return {
        "cluster_name": "fake",
        "max_workers": ACTORS,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "upscaling_speed": 1.0,
        # By its class, as a provider of one's own: the wheel lacks the default settings of the type fake_multinode.
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": gcs_address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "disable_node_updaters": True,  # nothing to install: the processes are the nodes
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **dict.fromkeys(NOTHING_TO_INSTALL, []),
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1},
                "labels": {"machine": "gpu"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": ACTORS,
            },
        },
    }


@pytest.fixture
def cluster(tmp_path):
    # The nodes find the code here: a --working-dir lies in Ray's folder, which fake machines share, and goes with the
    # first of them that leaves.
    with RayNodes(PYTHONPATH=str(ROOT)) as nodes:
        config = tmp_path / "autoscaling.json"
        config.write_text(json.dumps(autoscaling_config(nodes.address)))
        nodes.start_head(
            "--num-cpus=2", "--num-gpus=0", f"--autoscaling-config={config}",
            RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_enable_autoscaler_v2="1",  # as `ray up` does
            RAY_CLOUD_INSTANCE_ID=HEAD_ID, RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
        )  # fmt: skip
        yield nodes


def gpu_nodes(nodes: RayNodes) -> list[dict]:
    return [node for node in nodes.alive() if node["resources_total"].get("GPU")]


class Watch(threading.Thread):
    """Every GPU node that was there while this ran."""

    def __init__(self, nodes: RayNodes):
        super().__init__(daemon=True)
        self.nodes, self.seen, self.stop = nodes, {}, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            self.seen |= {node["node_id"]: node for node in gpu_nodes(self.nodes)}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_gpu_machines_join_for_a_score_job_and_leave(cluster: RayNodes, tiny_checkpoint: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(200)]
    data, output = tmp_path / "rows.jsonl", tmp_path / "scored"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_nodes(cluster) == []

    watch = Watch(cluster)
    watch.start()
    done = cluster.submit(
        "python", str(ROOT / "jobs" / "score.py"), "--model", tiny_checkpoint, "--data", str(data),
        "--validation", str(data), "--output", str(output), "--num-actors", str(ACTORS), "--gpus-per-actor", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((output / "manifest.json").read_text())["counts"]["rows_out"] == len(rows)

    left = time.monotonic()
    cluster.wait_until("the GPU machines have left", lambda: not gpu_nodes(cluster))
    watch.stop.set()
    watch.join()
    assert 1 <= len(watch.seen) <= ACTORS, watch.seen
    assert all(node["labels"]["machine"] == "gpu" for node in watch.seen.values())
    assert len(cluster.alive()) == 1, f"the head alone, {time.monotonic() - left:.0f} s later"
