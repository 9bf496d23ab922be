"""Baselines against plain logits."""

import pytest
import torch
from oracles import double, token_losses
from tiny_models import random_rows, tiny_model

from alphatoken.baselines import Baseline
from alphatoken.batching import make_batch
from alphatoken.model import prepare_model


def all_losses(model, rows):
    return torch.cat([token_losses(double(model), *row).detach() for row in zip(*rows, strict=True)]).float()


@pytest.mark.parametrize("architecture", ["llama", "llama4_text"])  # the latter's decoder has another name
def test_loss_and_excess_loss(architecture):
    model, reference = tiny_model(architecture, seed=0), tiny_model(architecture, seed=1)
    rows = random_rows(3, 4)
    here, there = all_losses(model, rows), all_losses(reference, rows)
    batch = make_batch(*rows)
    scoring = prepare_model(model)
    torch.testing.assert_close(Baseline(scoring, "loss")(batch).adaptation, here, rtol=1e-4, atol=1e-5)
    excess = Baseline(scoring, "excess_loss", reference=prepare_model(reference))(batch)
    torch.testing.assert_close(excess.adaptation, here - there, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(excess.logprobs, -here, rtol=1e-4, atol=1e-5)


def test_random_depends_on_seed_and_row_alone():
    scoring = prepare_model(tiny_model("llama"))
    ids, masks = random_rows(3, 4)
    whole = Baseline(scoring, "random", seed=7)
    together = whole(make_batch(ids, masks, [10, 11, 12, 13]))
    alone = whole(make_batch(ids[2:3], masks[2:3], [12])).adaptation
    assert torch.equal(make_batch(ids, masks).split(together.adaptation)[2], alone)
    other = Baseline(scoring, "random", seed=8)(make_batch(ids[2:3], masks[2:3], [12])).adaptation
    assert not torch.equal(other, alone)


def test_excess_loss_needs_a_reference():
    with pytest.raises(ValueError, match="reference"):
        Baseline(prepare_model(tiny_model("llama")), "excess_loss")
