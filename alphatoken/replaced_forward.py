"""Modules that run another function for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, each module's `forward` is this function; afterwards what it was before."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own  # type: ignore[method-assign]
