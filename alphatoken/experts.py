"""What mixtures of experts need: kernels with a forward-mode rule, and a routing that a small step does not change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from alphatoken.architecture import num_experts
from alphatoken.errors import UserError


@contextmanager
def differentiable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Fused experts run one after another inside.

    Grouped matrix products have no forward-mode rule, and batched ones copy an expert's matrices for every token.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def is_routed(model: nn.Module) -> bool:
    return any(num_experts(module) is not None for module in model.modules())


class FixedRouting(TorchFunctionMode):
    """The first pass inside notes which experts `torch.topk` chooses; later passes inside choose the same.

    A derivative keeps every token with its experts. A finite step does not: where it moves a token to another expert,
    the difference is a jump, which a small step divides into anything. Passes are compared from `layer` on.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.chosen: list[torch.Tensor] = []  # indices of every call
        self.position: int | None = None  # of the next call in `chosen`; None: noting

    def __enter__(self) -> "FixedRouting":
        self.hook = self.layer.register_forward_pre_hook(self._restart)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.hook.remove()
        self.position = 0
        if not self.chosen and exception[0] is None:
            raise UserError(
                f"{type(self.layer).__name__} does not choose its experts by torch.topk, so central difference cannot "
                "hold them: use --method forward"
            )

    def _restart(self, *_) -> None:
        if self.position is None:
            self.chosen.clear()  # of layers below
        else:
            self.position = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.topk and func is not torch.Tensor.topk:
            return func(*args, **kwargs)
        if self.position is None:
            found = func(*args, **kwargs)
            self.chosen.append(found.indices)
            return found
        indices = self.chosen[self.position]
        self.position += 1
        scores = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return torch.return_types.topk((scores.gather(dim, indices), indices))
