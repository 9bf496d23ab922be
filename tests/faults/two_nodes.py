"""`python -m tests.faults.two_nodes CONFIG.json SHARDS`: a score run that loses a node after so many shards."""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from alphatoken.config import ScoreConfig
from pipelines.score import run_score
from tests.faults.injection import faulty_actors


def main(path: str, shards: str) -> None:
    """Prints, as JSON, how many CPUs of the node were in use when it went."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    node = cluster.add_node(num_cpus=4)
    ray.init(address=cluster.address, log_to_driver=False)
    seen, used = [], []

    def progress(counts: dict) -> None:
        seen.append(counts)
        if len(seen) >= int(shards) and not used:
            free = ray._private.state.available_resources_per_node()[node.node_id]
            used.append(4 - free.get("CPU", 0))
            cluster.remove_node(node, allow_graceful=False)

    with faulty_actors():
        run_score(ScoreConfig(**json.loads(Path(path).read_text())), progress)
    sys.stdout.write(json.dumps({"used_cpus": used[0]}) + "\n")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
