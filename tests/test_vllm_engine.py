"""The gate of a vLLM replica: requests together, or those that an engine died on alone; and how answers ended."""

import asyncio
import random

import pytest
from tiny_tokenizers import CHATML, byte_level

from alphatoken.generate_config import EngineOptions, SamplingOptions
from alphatoken.sampling import finished
from pipelines.engines import ANSWERS, EnginePlan
from pipelines.vllm_engine import Gate, _answer


@pytest.mark.parametrize("seed", range(5))
def test_whoever_is_alone_is_alone_and_everybody_gets_in(seed):
    draw = random.Random(seed)
    inside: set[int] = set()
    most, done = [0], []

    async def enter(gate: Gate, number: int, alone: bool) -> None:
        await asyncio.sleep(draw.random() / 100)
        async with gate.alone() if alone else gate.shared():
            inside.add(number)
            most[0] = max(most[0], len(inside))
            for _ in range(3):
                assert not alone or inside == {number}
                await asyncio.sleep(draw.random() / 1000)
            inside.remove(number)
        done.append(number)

    async def run() -> None:
        gate = Gate()
        kinds = [draw.random() < 0.3 for _ in range(40)]
        await asyncio.wait_for(asyncio.gather(*(enter(gate, i, kind) for i, kind in enumerate(kinds))), 20)

    asyncio.run(run())
    assert sorted(done) == list(range(40)) and most[0] > 1


def test_a_stop_text_completed_by_the_last_possible_token_is_a_stop_with_either_engine(tiny_checkpoint):
    tokenizer = byte_level(CHATML)
    ids, ends = tokenizer("The answer is four.")["input_ids"], (tokenizer.eos_token_id,)
    for stop, reason in (["."], "stop"), (["?"], "length"), ([], "length"):
        sampling = SamplingOptions(max_new_tokens=len(ids), stop=stop)
        plan = EnginePlan(tiny_checkpoint, "auto", False, 100, 100, EngineOptions(), sampling, ends)
        row = dict.fromkeys(ANSWERS.names) | {"generated_tokens": ids, "generated_text": "", "logprobs": None}
        assert _answer(row, plan)["finish_reason"] == reason
        assert finished(ids, None, tokenizer, sampling, set(ends)).finish_reason == reason


def test_a_failure_inside_opens_the_gate_again():
    async def run() -> None:
        gate = Gate()
        for way in (gate.alone, gate.shared):
            with pytest.raises(RuntimeError):
                async with way():
                    raise RuntimeError
        async with gate.alone():
            pass

    asyncio.run(asyncio.wait_for(run(), 5))
