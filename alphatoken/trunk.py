"""The layers below the first scored one, run once for all forward passes of a batch."""

from contextlib import ExitStack

import torch
from torch import nn

from alphatoken.replaced_forward import replaced_forward


class Trunk:
    """Shares the layers below the first scored one between the forward passes of a batch.

    The first pass keeps the hidden states that enter layer `first_layer`. In later passes the layers below return
    their input at once and that layer gets the kept states; the model's own forward makes masks and positions.
    """

    def __init__(self, layers: nn.ModuleList, first_layer: int | None, hidden: torch.Tensor | None = None) -> None:
        self.layers, self.first_layer = layers, first_layer or 0
        self.hidden = hidden
        self._undo = ExitStack()

    def __enter__(self) -> "Trunk":
        if self.first_layer:
            hook = self.layers[self.first_layer].register_forward_pre_hook(self._enter_suffix, with_kwargs=True)
            self._undo.callback(hook.remove)
            if self.hidden is not None:
                skipped = dict.fromkeys(self.layers[: self.first_layer], _return_input)
                self._undo.enter_context(replaced_forward(skipped))
        return self

    def __exit__(self, *exception) -> None:
        self._undo.close()

    def _enter_suffix(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        key = "hidden_states"
        states = args[0] if args else kwargs[key]
        if self.hidden is None:
            self.hidden = states
        if args:
            return (self.hidden, *args[1:]), kwargs
        return args, kwargs | {key: self.hidden}


class _Skipped(torch.Tensor):
    """Passes through skipped layers: as their hidden states, or as the tuple that begins with them (Bloom)."""

    def __getitem__(self, index):
        return self if type(index) is int and index == 0 else super().__getitem__(index)


def _return_input(hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return hidden_states.as_subclass(_Skipped)
