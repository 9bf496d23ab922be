"""An LLM behind an engine as judge: questions of a shard, answers, and pairs from the verdicts."""

import json
from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data

from alphatoken.chat import ChatRenderer
from alphatoken.generate_config import PairConfig, SamplingOptions
from alphatoken.tokenizer import load_config, load_tokenizer
from pipelines import judges
from pipelines.engines import REQUESTS, answered, make_plan, sample_seed
from pipelines.pair_shards import read_groups, write_pairs

NO_QUESTION = "no question"  # a request that keeps a shard without questions in the stream


def judged_by_llm(shards: ray.data.Dataset, shared: dict[str, Any]) -> ray.data.Dataset:
    config: PairConfig = shared["config"]
    assert config.judge_model is not None
    context = getattr(
        load_config(config.judge_model, config.trust_remote_code).get_text_config(), "max_position_embeddings", 4096
    )
    sampling = SamplingOptions(temperature=0, max_new_tokens=config.judge_tokens)
    plan = make_plan(config.judge_model, "auto", config, context, sampling)
    ask = partial(ask_questions, config=config, samples=shared["samples"], longest=context - config.judge_tokens)
    asked = shards.map_batches(ask, batch_size=1, num_cpus=0.5)
    return answered(asked, plan, shared["output"]).map_batches(
        pair_by_verdicts, batch_size=None, batch_format="pyarrow", fn_kwargs=shared, num_cpus=0.5
    )


def ask_questions(batch: dict, config: PairConfig, samples: int, longest: int) -> pa.Table:
    """REQUESTS to the judge, all of a shard in one block."""
    [shard] = map(str, batch["shard"])
    assert config.judge_model is not None
    template = judges.read_template(config.judge_template)
    tokenizer = load_tokenizer(config.judge_model, config.trust_remote_code)
    chat = ChatRenderer(tokenizer)
    rows = [_request(0, json.dumps({"shard": shard}), [], NO_QUESTION)]
    for group in read_groups(shard, samples):
        for number, (first, second, question) in enumerate(judges.questions(group, template)):
            text = chat.render([{"role": "user", "content": question}], add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            reason = "" if len(ids) <= longest else f"the question has {len(ids)} tokens; {longest} are possible"
            row_id = group.row_id * samples**2 + number
            rows.append(_request(row_id, judges.carried(group, shard, first, second), ids, reason))
    return pa.Table.from_pylist(rows, schema=REQUESTS)


def _request(row_id: int, carried: str, ids: list[int], reason: str) -> dict[str, Any]:
    return {"row_id": row_id, "carried": carried, "prompt_ids": ids, "seed": sample_seed(0, 0, 0), "reason": reason}


def _check_whole(shard: str, groups: list[judges.Group], asked: int) -> None:
    """A torn block is a bug: its pieces would write over each other's shard."""
    expected = 1 + sum(len(group.candidates) * (len(group.candidates) - 1) for group in groups)  # 1: NO_QUESTION
    if asked != expected:
        raise RuntimeError(
            f"internal error: a block has {asked} of the {expected} rows that the judge was asked for {shard}, so "
            "blocks were split; nothing of it was written, please report this"
        )


def pair_by_verdicts(block: pa.Table, config: PairConfig, samples: int, output: str) -> dict[str, list]:
    """Verdicts of whole shards to pairs, written; returns their counts, a row per shard."""
    by_shard: dict[str, dict[int, dict]] = {}
    errors: dict[tuple[str, int], str] = {}
    costs: dict[str, dict[str, Any]] = {}
    asked: Counter = Counter()  # rows of each shard
    for row in block.select(["carried", "text", "reason", "worker", "seconds"]).to_pylist():
        place = json.loads(row["carried"])
        asked[place["shard"]] += 1
        cost = costs.setdefault(place["shard"], {"worker": "none", "seconds": 0.0})  # a shard without questions
        if row["worker"]:
            cost |= {"worker": row["worker"], "seconds": cost["seconds"] + row["seconds"]}
        verdicts = by_shard.setdefault(place["shard"], {})
        if "first" in place:
            own = verdicts.setdefault(place["row_id"], {})
            own[place["first"], place["second"]] = judges.read_verdict(row["text"])
            if row["reason"]:
                errors[place["shard"], place["row_id"]] = row["reason"]
    total: dict[str, list] = {}
    for shard, verdicts in by_shard.items():
        groups = read_groups(shard, samples)
        _check_whole(shard, groups, asked[shard])
        contradictions = 0
        for group in groups:
            contradictions += judges.settle(group, verdicts.get(group.row_id, {}))
            if group.reason == "the judge gave no verdict":
                group.reason = errors.get((shard, group.row_id), group.reason)
        written = write_pairs(shard, groups, config, samples, output, costs[shard])
        counts = written | {"inconsistent_verdicts": [contradictions]}
        for name, value in counts.items():
            total.setdefault(name, []).extend(value)
    return total
