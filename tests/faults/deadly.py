"""Actors whose process, or engine, dies on one row. In a module of their own: engines take long to import."""

import asyncio
import os
import signal
from typing import Any

import psutil
import pyarrow as pa
import ray

from pipelines.cluster import MANY_DEATHS
from pipelines.engines import TransformersSampler
from pipelines.vllm_engine import NotedEngine
from pipelines.window_scorer import WindowScorer

DEADLY_SAMPLE = 13  # a row id


class DeadlySampler(TransformersSampler):
    """The process that answers DEADLY_SAMPLE dies."""

    def _fill(self, rows: list[dict]) -> None:
        if any(row["row_id"] == DEADLY_SAMPLE for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        super()._fill(rows)


class DeadlyEngine(NotedEngine):
    """vLLM's engine dies whenever DEADLY_SAMPLE is in it."""

    async def _generate_with_error_handling(self, row: dict, batch_uuid: Any) -> dict:
        answer = asyncio.ensure_future(super()._generate_with_error_handling(row, batch_uuid))
        if row["row_id"] == DEADLY_SAMPLE:
            await asyncio.sleep(0.1)  # it is in the engine, and not done
            for engine in vllm_engines():
                engine.kill()
        return await answer


def vllm_engines() -> list[psutil.Process]:
    """The processes in which vLLM computes, of this run."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = [process.info["name"] or "", *(process.info["cmdline"] or [])]
        if any("EngineCore" in word for word in words):
            found.append(process)
    return found


class _DeadlyScorer(WindowScorer.__ray_metadata__.modified_class):
    """The process that values DEADLY_SAMPLE dies."""

    def _score(self, table: pa.Table, estimator: Any) -> Any:
        if DEADLY_SAMPLE in table["row_id"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        return super()._score(table, estimator)


DeadlyWindowScorer: Any = ray.remote(max_restarts=-1, max_task_retries=MANY_DEATHS)(_DeadlyScorer)
