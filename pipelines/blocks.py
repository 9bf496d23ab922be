"""Ray Data's blocks, whole, to an actor."""

from typing import Any

import ray.data


def map_blocks(dataset: ray.data.Dataset, actor: type, *, num_gpus: float = 0, **options: Any) -> ray.data.Dataset:
    """`map_batches` of whole blocks as Arrow tables, also where the actor has GPUs.

    `map_batches` itself refuses `batch_size=None` with GPUs, because it cannot know what fits them. Our actors make
    batches of a block's rows by themselves, under a token budget. A number in its place would join blocks.
    """
    apply = dataset.map_batches_internal if num_gpus else dataset.map_batches
    return apply(actor, batch_size=None, batch_format="pyarrow", num_gpus=num_gpus, **options)
