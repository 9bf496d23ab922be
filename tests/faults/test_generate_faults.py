"""`generate` with a vLLM engine that dies, and with a prompt that kills the transformers engine: no sample is lost."""

import importlib.util
import json
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest

from alphatoken.config import EMBEDDED_MODEL, embedded_data
from alphatoken.generate_config import GenerateConfig
from pipelines.generate import run_generate
from pipelines.poison import DIED
from tests.faults.deadly import DEADLY_SAMPLE, DeadlyEngine, DeadlySampler, vllm_engines

PROMPTS, SAMPLES = 48, 4
pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class EngineKiller:
    """Progress that kills -9 the engine after the first shard."""

    def __init__(self) -> None:
        self.killed: set[int] = set()

    def __call__(self, counts: dict) -> None:
        if not self.killed:
            for process in vllm_engines():
                process.kill()
                self.killed.add(process.pid)


def rows_of(config: GenerateConfig, kind: str = "data") -> list[dict]:
    shards = sorted(Path(config.output, kind).glob("*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def test_a_prompt_that_kills_is_put_aside_and_the_others_are_answered_as_ever(tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(8)))
    settings = {"model": tiny_checkpoint, "prompts": [str(prompts)], "engine": "transformers", "samples": 4,
                "max_new_tokens": 8, "batch_tokens": 64, "shard_rows": 16}  # fmt: skip
    undisturbed = GenerateConfig(output=str(tmp_path / "undisturbed"), **settings)
    run_generate(undisturbed)
    config = GenerateConfig(output=str(tmp_path / "disturbed"), **settings)
    with mock.patch("pipelines.engines.TransformersSampler", DeadlySampler):
        manifest = run_generate(config)
    assert (manifest["counts"]["rows_out"], manifest["counts"]["rows_quarantined"]) == (31, 1)
    expected = {row["row_id"]: row["token_ids"] for row in rows_of(undisturbed)}
    assert {row["row_id"]: row["token_ids"] for row in rows_of(config)} == {
        row: ids for row, ids in expected.items() if row != DEADLY_SAMPLE
    }
    [aside] = rows_of(config, "quarantine")
    assert aside["row_id"] == DEADLY_SAMPLE and aside["reason"].startswith(DIED)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@needs_vllm
@pytest.mark.timeout(900)
def test_a_prompt_that_kills_every_vllm_engine_is_put_aside(tmp_path):
    config = GenerateConfig(
        model=EMBEDDED_MODEL, prompts=[str(embedded_data() / "sums_prompts.jsonl")], output=str(tmp_path / "responses"),
        limit=12, samples=2, max_new_tokens=64, engine="vllm", max_length=256, shard_rows=8, batch_tokens=256,
    )  # fmt: skip
    with mock.patch("pipelines.vllm_engine.NotedEngine", DeadlyEngine):
        manifest = run_generate(config)
    assert (manifest["counts"]["rows_out"], manifest["counts"]["rows_quarantined"]) == (23, 1)
    [aside] = rows_of(config, "quarantine")
    assert aside["row_id"] == DEADLY_SAMPLE and aside["reason"].startswith(DIED)
    assert sorted(row["row_id"] for row in rows_of(config)) == [i for i in range(24) if i != DEADLY_SAMPLE]
    assert sum(worker["rows"] for worker in manifest["workers"]) == 24


@needs_vllm
@pytest.mark.timeout(900)
def test_an_engine_that_dies_loses_no_sample(tmp_path):
    config = GenerateConfig(
        model=EMBEDDED_MODEL, prompts=[str(embedded_data() / "sums_prompts.jsonl")], output=str(tmp_path / "responses"),
        limit=PROMPTS, samples=SAMPLES, max_new_tokens=32, temperature=0.8, engine="vllm", max_length=256,
        shard_rows=SAMPLES,
    )  # fmt: skip
    killer = EngineKiller()
    manifest = run_generate(config, killer)
    assert killer.killed
    counts = manifest["counts"]
    assert (counts["prompts"], counts["rows_in"], counts["rows_quarantined"]) == (PROMPTS, PROMPTS * SAMPLES, 0)
    rows = rows_of(config)
    assert sorted(row["row_id"] for row in rows) == list(range(PROMPTS * SAMPLES))
    assert all(row["token_ids"] and len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
