"""Our attention function against transformers' eager attention, plain and with a key-value cache."""

import pytest
import torch
from oracles import double
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM

import alphatoken.attention as attention
from alphatoken.attention import NAME, recording
from alphatoken.banded_average import banded_average
from alphatoken.model import prepare_model


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES | MORE_ARCHITECTURES)
def test_logits_equal_eager_attention(architecture, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    model = tiny_model(architecture)
    ids = torch.randint(3, 60, (2, 30))
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_banded_average_with_sinks_equals_eager_attention():
    """gpt-oss: what falls to a sink is lost, and every other layer sees a window of 6."""
    ids, delta = torch.randint(3, 60, (1, 20)), torch.randn(1, 20, 3, dtype=torch.float64)
    model = double(tiny_model("gpt_oss"))
    expected = [a[0].mean(0) for a in model(input_ids=ids, output_attentions=True, use_cache=False).attentions]
    model.set_attn_implementation(NAME)
    with recording({0, 1}) as seen:
        model(input_ids=ids, use_cache=False)
    for layer, average in enumerate(expected[:2]):
        assert float(average.sum(-1).max()) < 1
        band = average.tril(-1).triu(-8)  # query, key
        torch.testing.assert_close(banded_average(seen[layer], delta, 8)[0], band.T @ delta[0], rtol=1e-5, atol=1e-6)


def test_a_model_with_attention_of_its_own_keeps_its_masks():
    """Bloom ignores the attention that it is given, and adds to its logits whatever mask that attention would get."""
    model = tiny_model("bloom")
    ids = torch.randint(3, 60, (2, 9))
    expected = model(input_ids=ids, use_cache=False).logits
    given = AutoModelForCausalLM.from_config(model.config, attn_implementation=NAME).eval()
    given.load_state_dict(model.state_dict())
    assert not torch.allclose(given(input_ids=ids, use_cache=False).logits, expected, atol=1e-2)
    prepare_model(given)
    torch.testing.assert_close(given(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_generation_with_a_cache_and_left_padding_equals_eager(architecture):
    """Fisher samples are generated so: one query against many cached keys."""
    model = tiny_model(architecture)
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    expected = model.generate(ids, **options)
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(ids, **options), expected)
