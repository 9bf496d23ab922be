"""cluster.yaml against Ray's own schema and its preparation of a configuration; nothing is started."""

import copy
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
GPU, HEAD = "gpu", "head"


@pytest.fixture(scope="module")
def given() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(given: dict) -> dict:
    return prepare_config(copy.deepcopy(given))


def test_ray_accepts_it(prepared: dict) -> None:
    validate_config(prepared)


def test_the_schema_would_object(given: dict) -> None:
    """The check above checks something."""
    broken = prepare_config(copy.deepcopy(given) | {"idle_timeout_minuets": 5})
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(broken)


def test_gpu_machines_are_spot_and_go_down_to_none(prepared: dict) -> None:
    gpu = prepared["available_node_types"][GPU]
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= prepared["max_workers"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert prepared["idle_timeout_minutes"] > 0
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_there_is_one_head_and_it_is_not_spot(prepared: dict) -> None:
    assert prepared["head_node_type"] == HEAD
    head = prepared["available_node_types"][HEAD]
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_what_is_edited_at_the_top_arrives(given: dict) -> None:
    edit, types = given["metadata"], given["available_node_types"]
    assert (given["provider"]["type"], given["provider"]["region"]) == (edit["cloud"], edit["region"])
    assert types[HEAD]["node_config"]["InstanceType"] == edit["head_machine"]
    assert types[GPU]["node_config"]["InstanceType"] == edit["gpu_machine"]
    assert types[GPU]["max_workers"] == given["max_workers"] == edit["max_gpu_machines"]
    assert given["idle_timeout_minutes"] == edit["idle_minutes"]
    assert {types[name]["node_config"]["ImageId"] for name in (HEAD, GPU)} == {edit["image"]}


def test_only_gpu_machines_install_vllm(prepared: dict) -> None:
    head, worker = (" ".join(prepared[f"{kind}_setup_commands"]) for kind in ("head", "worker"))
    assert "alphatoken[train]" in head and "vllm" not in head
    assert "alphatoken[train,vllm]" in worker


def test_ray_wants_the_token_and_every_node_has_it(prepared: dict) -> None:
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    (target,) = prepared["file_mounts"]
    assert target == "/home/ray/.ray/auth_token"  # where Ray looks in its own images
    assert prepared["file_mounts"][target].endswith("/.ray/auth_token")
    assert "disabled" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_the_dashboard_is_not_open_to_the_network(prepared: dict) -> None:
    (start,) = [command for command in prepared["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


def test_images_hold_the_ray_of_the_lock_file(given: dict) -> None:
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    version = re.search(r"^ray==(\S+)", lock, re.MULTILINE)
    assert version
    for kind in ("cpu", "gpu"):
        image = given["docker"]["head_image" if kind == "cpu" else "worker_image"]
        assert re.fullmatch(rf"rayproject/ray:{re.escape(version[1])}-py31[1-3]-{kind}", image)


@pytest.mark.parametrize("failing", ["", "up", "job submit"])
def test_a_script_that_fails_says_that_the_cluster_costs_money(tmp_path: Path, failing: str) -> None:
    """With a `ray` that only notes what it is told, and fails at one thing."""
    ray = tmp_path / "ray"
    ray.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in\ndashboard*) exec sleep 60 ;;\n'
        f'"{failing or "nothing"}"*) exit 3 ;;\nesac\n'
    )
    ray.chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BUCKET": "s3://bucket"}
    command = ["bash", str(ROOT / "examples" / "cluster_run.sh")]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=60)
    said = "the cluster may still run, and costs money until `ray down cluster.yaml`" in done.stderr
    assert (done.returncode, said) == ((3, True) if failing else (0, False))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (calls[-1] == "down --yes cluster.yaml") != bool(failing)
