"""A trunk on several GPUs: the layers below the first scored one, through which no gradient passes.

    first GPU      embedding, the last layers of the trunk, scored layers, head: all that estimators look at
    other GPUs     the trunk's layers before them, in order, about as many bytes on each

What a layer is given (hidden states, masks, positions) goes to its GPU as it is called. Not yet run on GPUs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from alphatoken.architecture import decoder_layers, first_scored_layer
from alphatoken.errors import UserError


@dataclass(frozen=True)
class SpreadTrunk:
    """Where the layers of a model go as it is loaded."""

    devices: tuple[torch.device, ...]  # two or more
    parameters: str  # what is scored

    @classmethod
    def of(cls, gpus: float, parameters: str | None) -> "SpreadTrunk | None":
        """Over all GPUs that this process sees; None where it has one, or a part of one.

        Raises:
            UserError: `gpus` is no whole number, or the process sees fewer.
        """
        if gpus <= 1:
            return None
        seen = torch.cuda.device_count()
        if gpus != int(gpus) or seen < gpus:
            raise UserError(f"--gpus-per-actor {gpus:g}: above one GPU a whole number is needed; {seen} can be seen")
        return cls(tuple(torch.device("cuda", number) for number in range(int(gpus))), parameters or "")

    def layer_devices(self, model: PreTrainedModel) -> list[torch.device]:
        """The device of every decoder layer.

        Raises:
            UserError: the first layer is scored, so that there is no trunk.
        """
        layers, first = decoder_layers(model), first_scored_layer(model, self.parameters)
        if not first:
            raise UserError(
                f"--gpus-per-actor {len(self.devices)}: --parameters {self.parameters} scores the first layer too, and "
                "what is scored has to be on one GPU; give --parameters last-layers:K"
            )
        sizes = [_bytes(layer) for layer in layers]
        numbers = split(sizes[:first], _bytes(model) - sum(sizes[:first]), len(self.devices))
        return [self.devices[number] for number in numbers] + [self.devices[0]] * (len(layers) - first)

    def apply(self, model: PreTrainedModel, places: list[torch.device]) -> None:
        """Move the model, and have each layer be given what it needs on its device. places: of `layer_devices`."""
        layers = decoder_layers(model)
        place_of = {inner: place for layer, place in zip(layers, places, strict=True) for inner in layer.modules()}
        moved: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            _move_own(module, place_of.get(module, self.devices[0]), moved)
        for layer, place in zip(layers, places, strict=True):
            layer.register_forward_pre_hook(_to_device(place), with_kwargs=True)


def split(sizes: list[int], rest: int, count: int) -> list[int]:
    """The device of every layer, by number: the first layers on device 1, the next on 2 ..., the last ones on 0, where
    `rest` bytes are already. About as many bytes on each.
    """
    share = (sum(sizes) + rest) / count
    numbers, device, filled = [], 1 % count, 0
    for size in sizes:
        if device and filled and filled + size / 2 > share:
            device, filled = (device + 1) % count, 0
        numbers.append(device)
        filled += size
    return numbers


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _move_own(module: nn.Module, device: torch.device, moved: dict[nn.Parameter, nn.Parameter]) -> None:
    """The parameters and buffers of the module itself, not of those in it. moved: so that tied ones stay tied."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter not in moved:
            moved[parameter] = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
        setattr(module, name, moved[parameter])
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))


def _to_device(device: torch.device) -> Any:
    def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (args, kwargs))

    return move
