import pytest
import torch
from torch.nn.functional import logsigmoid

from alphatoken import losses

B, T, V = 3, 7, 11


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    kept = torch.rand(B, T, generator=generator) < 0.5
    return logits, labels, kept


def test_sft_is_the_sum_over_kept_tokens(tensors):
    logits, labels, kept = tensors
    kept[:, 0] = True  # nothing predicts the first token: it never counts
    found = losses.masked_sft_loss(logits, labels.where(kept, -100))
    total, count = 0.0, 0
    for row in range(B):
        for position in range(1, T):
            if kept[row, position]:
                total = total - logits[row, position - 1].log_softmax(-1)[labels[row, position]]
                count += 1
    assert found.count.item() == count
    torch.testing.assert_close(found.total, total)
    (ours,), (hand,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (found.total, total))
    torch.testing.assert_close(ours, hand)


def test_weights_scale_each_token(tensors):
    logits, labels, kept = tensors
    weights = torch.rand(B, T, dtype=torch.float64)
    found = losses.masked_sft_loss(logits, labels.where(kept, -100), weights)
    logprobs = losses.token_logprobs(logits, labels)
    inside = kept.clone()
    inside[:, 0] = False
    torch.testing.assert_close(found.total, -(logprobs * weights)[inside].sum())
    torch.testing.assert_close(found.count, weights[inside].sum())


def test_nothing_kept_is_a_zero_with_a_zero_count(tensors):
    logits, labels, _ = tensors
    found = losses.masked_sft_loss(logits, torch.full_like(labels, -100))
    assert found.total.item() == 0 and found.count.item() == 0


def sides(seed: int):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randn(B, T, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    references = [torch.randn(B, T, dtype=torch.float64, generator=generator) for _ in range(2)]
    masks = [torch.rand(B, T, generator=generator) < 0.5 for _ in range(2)]
    return chosen, rejected, masks, references


def test_dpo_loss_mode_is_equation_14():
    chosen, rejected, (keep_c, keep_r), (ref_c, ref_r) = sides(1)
    beta = 0.3
    found = losses.dpo_loss(chosen, rejected, keep_c, keep_r, ref_c, ref_r, beta, "loss")
    s = beta * ((chosen - ref_c).sum(1) - (rejected - ref_r).sum(1))
    omega = beta * torch.sigmoid(-s).detach()
    torch.testing.assert_close(losses.dpo_omega((chosen - ref_c).sum(1), (rejected - ref_r).sum(1), beta), omega)
    torch.testing.assert_close(found.total, -logsigmoid(s).sum())
    assert found.count.item() == B
    grad_c, grad_r = torch.autograd.grad(found.total, (chosen, rejected))
    torch.testing.assert_close(grad_c, -omega[:, None] * keep_c)
    torch.testing.assert_close(grad_r, omega[:, None] * keep_r)


def test_dpo_ratio_mode_sees_kept_tokens_only():
    chosen, rejected, (keep_c, keep_r), (ref_c, ref_r) = sides(2)
    beta = 0.3
    found = losses.dpo_loss(chosen, rejected, keep_c, keep_r, ref_c, ref_r, beta, "ratio")
    s = beta * (((chosen - ref_c) * keep_c).sum(1) - ((rejected - ref_r) * keep_r).sum(1))
    omega = beta * torch.sigmoid(-s).detach()
    torch.testing.assert_close(found.total, -logsigmoid(s).sum())
    grad_c, grad_r = torch.autograd.grad(found.total, (chosen, rejected))
    torch.testing.assert_close(grad_c, -omega[:, None] * keep_c)
    torch.testing.assert_close(grad_r, omega[:, None] * keep_r)


def test_dpo_modes_agree_where_everything_is_kept():
    chosen, rejected, _, (ref_c, ref_r) = sides(3)
    everything = torch.ones(B, T, dtype=torch.bool)
    found = [
        losses.dpo_loss(chosen, rejected, everything, everything, ref_c, ref_r, 0.1, mode) for mode in ("loss", "ratio")
    ]
    torch.testing.assert_close(found[0].total, found[1].total)
    grads = [torch.autograd.grad(loss.total, chosen)[0] for loss in found]
    torch.testing.assert_close(*grads)
