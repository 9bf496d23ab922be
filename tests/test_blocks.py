"""Whole blocks to actors, with and without GPUs."""

import pyarrow as pa
import pytest
import ray

from pipelines.blocks import map_blocks
from pipelines.cluster import actor_pool


def counter() -> type:
    """Made here, so that it travels to the workers by value: they do not know this module."""

    class CountRows:
        def __call__(self, block: pa.Table) -> dict:
            return {"rows": [block.num_rows]}

    return CountRows


@pytest.mark.parametrize("gpus", [0, 0.5, 1])
def test_ray_takes_blocks_for_an_actor_with_gpus(local_ray, gpus):
    """The plan alone: nothing is run, there may be no GPU."""
    rows = ray.data.from_items([{"row": i} for i in range(9)], override_num_blocks=3)
    planned = map_blocks(rows, counter(), compute=actor_pool(1, 1), num_cpus=1, num_gpus=gpus)
    assert "CountRows" in str(planned)


def test_a_block_arrives_whole(local_ray):
    rows = ray.data.from_items([{"row": i} for i in range(9)], override_num_blocks=3)
    counted = map_blocks(rows, counter(), compute=actor_pool(1, 1), num_cpus=0.5)
    assert sorted(row["rows"] for row in counted.iter_rows()) == [3, 3, 3]
