"""What does not fit on one machine is refused: Ray would wait for it for ever."""

import pytest
import ray
import torch

from alphatoken.errors import UserError
from alphatoken.rounds_config import RoundsConfig
from pipelines import cluster
from pipelines.cluster import LOCAL_CPUS, SLOTS, check_gpus, room_for
from pipelines.rounds import check_room


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Two GPUs and two cores, no Ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)


def test_gpus_that_are_not_there(monkeypatch):
    check_gpus("--num-actors", 2, 1)
    check_gpus("--num-actors", 9, 0)
    check_gpus("--num-actors", 8, 0.25)
    with pytest.raises(UserError, match="--num-actors 3 needs 3 GPUs, there are 2 here for it; give fewer"):
        check_gpus("--num-actors", 3, 1)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster, which may grow
    check_gpus("--num-actors", 3, 1)


def test_the_ray_that_is_there_says_what_there_is(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(UserError, match="there are 0 here"):
        check_gpus("--replicas", 1, 1)


def test_workers_and_actors_of_rounds_fit_together():
    config = RoundsConfig(
        data=["d"], model="m", output="o", validation=["v"], num_workers=1, gpus_per_worker=1, gpus_per_actor=1
    )
    check_room(config)
    with pytest.raises(UserError, match="--num-actors 2 needs 2 GPUs, there are 1 here for it"):
        check_room(config.model_copy(update={"num_actors": 2}))


def test_actors_leave_slots_for_other_tasks():
    assert room_for(1, 1) == LOCAL_CPUS
    assert room_for(4, 1) == 4 + SLOTS
    assert room_for(3, 0.5) == 2 + SLOTS
