"""The fallback engine's draws: seeded by row, of the right distribution, with the model's own log-probabilities."""

import pytest
import torch
from oracles import token_losses
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level

from alphatoken.generate_config import SamplingOptions
from alphatoken.model import prepare_model
from alphatoken.sampling import SeededDraw, draw_samples, finished

PROMPTS = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45]]


@pytest.fixture(scope="module")
def scoring():
    return prepare_model(tiny_model("llama", vocab_size=512))


def draw(scoring, prompts, seeds, **options):
    settings = SamplingOptions(**({"max_new_tokens": 8} | options))
    return draw_samples(scoring, byte_level(CHATML), prompts, seeds, settings, {3})


def test_a_sample_depends_on_its_seed_and_prompt_alone(scoring):
    together = draw(scoring, PROMPTS, [1, 2, 3])
    turned = draw(scoring, PROMPTS[::-1], [3, 2, 1])[::-1]
    alone = [draw(scoring, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)]
    assert [s.token_ids for s in together] == [s.token_ids for s in turned] == [s.token_ids for s in alone]
    assert draw(scoring, PROMPTS[:1], [9])[0].token_ids != together[0].token_ids


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.7}])
def test_log_probabilities_are_the_model_s_own(scoring, options):
    for prompt, sample in zip(PROMPTS, draw(scoring, PROMPTS, [1, 2, 3], **options), strict=True):
        row = prompt + sample.token_ids
        expected = -token_losses(scoring.model, row, [i >= len(prompt) for i in range(len(row))])
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected.float(), rtol=1e-4, atol=1e-4)


def test_temperature_zero_takes_the_likeliest(scoring):
    [sample] = draw(scoring, PROMPTS[:1], [5], temperature=0)
    logits = scoring.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert sample.token_ids[0] == int(logits.argmax())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.75)])
def test_draws_follow_the_distribution(temperature, top_p):
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    process = SeededDraw(range(4000), temperature, top_p)
    drawn = process(torch.zeros(4000, 1), logprobs.repeat(4000, 1)).argmax(-1)
    expected = (logprobs / temperature).softmax(-1)
    if top_p < 1:  # 0.5 and 0.3 hold 0.8
        expected = torch.tensor([0.625, 0.375, 0.0, 0.0])
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected, rtol=0, atol=0.03)


def test_where_a_response_ends():
    tokenizer = byte_level(CHATML)
    end = tokenizer.eos_token_id
    ids = tokenizer("The answer is four. And more")["input_ids"]
    settings = SamplingOptions(max_new_tokens=len(ids))
    assert finished(ids, None, tokenizer, settings, {end}).finish_reason == "length"
    sample = finished([*ids[:2], end, *ids[2:]], [0.0] * (len(ids) + 1), tokenizer, settings, {end})
    assert (sample.token_ids, sample.finish_reason, len(sample.logprobs)) == ([*ids[:2], end], "stop", 3)
    stopped = finished(ids, None, tokenizer, SamplingOptions(max_new_tokens=len(ids), stop=["."]), {end})
    assert (stopped.text, stopped.finish_reason) == ("The answer is four", "stop")
    assert "." in tokenizer.decode(stopped.token_ids) and "And" not in tokenizer.decode(stopped.token_ids)


def test_an_end_token_that_is_no_special_one_is_not_in_the_text():
    tokenizer = byte_level(CHATML)
    ids = tokenizer("four!")["input_ids"]
    sample = finished(ids, None, tokenizer, SamplingOptions(max_new_tokens=9), {ids[-1]})
    assert tokenizer.decode(ids[-1:]) == "!"
    assert (sample.token_ids, sample.text, sample.finish_reason) == (ids, "four", "stop")


def test_a_stop_text_ends_a_row_alike_alone_and_beside_others(scoring):
    options = {"stop": ["e", " "], "max_new_tokens": 24}
    prompts, seeds = [[20 + i] for i in range(24)], list(range(24))
    together = draw(scoring, prompts, seeds, **options)
    for prompt, seed, sample in zip(prompts, seeds, together, strict=True):
        assert draw(scoring, [prompt], [seed], **options)[0].token_ids == sample.token_ids
    assert {sample.finish_reason for sample in together} >= {"stop"}
