"""Ray Data's blocks, whole, to an actor."""

from typing import Any

import ray.data


def keep_whole(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """The same data set, no stage of which splits blocks, whatever their size. Ray's default cuts those above 192 MiB,
    which tears apart rows that become one shard. A data set shares its context with those before and behind it.
    """
    dataset.context.target_max_block_size = None
    return dataset


def map_blocks(dataset: ray.data.Dataset, actor: type, *, num_gpus: float = 0, **options: Any) -> ray.data.Dataset:
    """`map_batches` of whole blocks as Arrow tables, also where the actor has GPUs.

    `map_batches` itself refuses `batch_size=None` with GPUs, because it cannot know what fits them. Our actors make
    batches of a block's rows by themselves, under a token budget. A number in its place would join blocks.
    """
    apply = dataset.map_batches_internal if num_gpus else dataset.map_batches
    return apply(actor, batch_size=None, batch_format="pyarrow", num_gpus=num_gpus, **options)
