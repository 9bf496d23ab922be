"""Losses and gradients of the head against autograd."""

import pytest
import torch
from oracles import double
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from torch.nn import functional as F

import alphatoken.head as head_module
from alphatoken.errors import UserError
from alphatoken.model import prepare_model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "granite"])
@pytest.mark.parametrize("chunk", [VOCABULARY * 3, 2**24])
def test_losses_gradients_and_entropy(architecture, chunk, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    scoring = prepare_model(tiny_model(architecture))
    projection = double(scoring.model).get_output_embeddings()
    softcap = getattr(scoring.model.config, "final_logit_softcapping", None)
    hidden = torch.randn(10, projection.in_features)
    targets = torch.randint(0, VOCABULARY, (10,))
    leaf = hidden.double().requires_grad_()
    logits = projection(leaf) / getattr(scoring.model.config, "logits_scaling", 1.0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    weight = torch.rand(10)
    hidden_gradient, _ = torch.autograd.grad(expected.sum(), [leaf, projection.weight], retain_graph=True)
    (weight_gradient,) = torch.autograd.grad((expected * weight).sum(), [projection.weight])
    buffer = torch.zeros(projection.weight.shape)
    out = scoring.head(hidden, targets, gradient=True, entropy=True, weight_gradient=buffer, token_weights=weight)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(out.losses, expected.detach(), **close)
    torch.testing.assert_close(out.hidden_gradient, hidden_gradient, **close)
    torch.testing.assert_close(buffer, weight_gradient, **close)
    entropy = torch.distributions.Categorical(logits=logits).entropy().detach()
    torch.testing.assert_close(out.entropy, entropy, **close)


def test_an_unknown_head_is_an_error():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(UserError, match="logits"):
        prepare_model(model)
