"""Modules that run another function for a while."""

import pytest
import torch
from torch import nn

from alphatoken.replaced_forward import replaced_forward


def test_what_stood_there_comes_back():
    plain, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    replaced.forward = lambda x: x + 1
    x = torch.ones(1, 2)
    expected = plain(x)
    with pytest.raises(KeyError), replaced_forward({plain: torch.neg, replaced: torch.neg}):
        with replaced_forward({plain: torch.zeros_like}):
            assert torch.equal(plain(x), torch.zeros(1, 2))
        assert torch.equal(plain(x), -x) and torch.equal(replaced(x), -x)
        raise KeyError
    assert torch.equal(plain(x), expected) and torch.equal(replaced(x), x + 1)
    assert "forward" not in plain.__dict__
