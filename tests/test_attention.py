"""Our attention function against transformers' eager attention, plain and with a key-value cache."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

import alphatoken.attention as attention
from alphatoken.attention import NAME


@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_eager_attention(architecture, block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    model = tiny_model(architecture)
    ids = torch.randint(3, 60, (2, 30))
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


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
