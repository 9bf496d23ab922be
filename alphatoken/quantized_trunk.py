"""A trunk of fewer bits: the layers below the first scored one, through which no gradient passes.

    int8               weights of linear layers, one scale per output channel (torchao's Int8WeightOnlyConfig)
    nf4                the same in 4-bit NormalFloat (torchao's NF4Tensor; arXiv 2305.14314), a scale per 64 weights
    everything else    as it was: embedding, norms, scored layers, head; experts in one 3-D parameter

Activations keep their dtype, so estimators see nothing of it but hidden states that differ a little.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from alphatoken.architecture import decoder_layers, first_scored_layer
from alphatoken.errors import UserError

logger = logging.getLogger(__name__)

NF4_BLOCK, NF4_SCALES = 64, 256  # weights that share a scale, and scales that share one of theirs (at most)


@dataclass(frozen=True)
class QuantizedTrunk:
    """What a model's trunk is turned into as it is loaded."""

    dtype: str  # int8 or nf4
    parameters: str  # what is scored

    @classmethod
    def of(cls, dtype: str | None, parameters: str | None) -> "QuantizedTrunk | None":
        """None where nothing is asked for."""
        return cls(dtype, parameters or "") if dtype else None

    def apply(self, model: PreTrainedModel, devices: list[torch.device]) -> None:
        """Quantise in place, one layer at a time on its device: none ever holds the whole model unquantised.

        Raises:
            UserError: there is no such trunk, it has no linear layer, or torchao is not installed.
        """
        first = first_scored_layer(model, self.parameters)
        if not first:
            raise UserError(
                f"--trunk-dtype {self.dtype}: --parameters {self.parameters} scores the first layer too, so no layer "
                "is below; give --parameters last-layers:K"
            )
        trunk = list(decoder_layers(model)[:first])
        if not any(isinstance(module, nn.Linear) for layer in trunk for module in layer.modules()):
            raise UserError(f"--trunk-dtype {self.dtype}: the layers of {type(model).__name__} are not torch's linear")
        try:
            quantize = {"int8": _to_int8, "nf4": _to_nf4}[self.dtype]
            for layer, device in zip(trunk, devices, strict=False):
                quantize(layer, device)
        except ImportError as error:
            raise UserError(
                f"--trunk-dtype {self.dtype} needs torchao: pip install 'alphatoken[quantize]'"
            ) from error
        logger.info("the first %d of %d layers have %s weights", first, len(decoder_layers(model)), self.dtype)


def _to_int8(layer: nn.Module, device: torch.device) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(), device=device)


def _to_nf4(layer: nn.Module, device: torch.device) -> None:
    """A weight whose size is no multiple of a block's stays as it is."""
    from torchao.quantization import to_nf4

    layer.to(device)
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() % NF4_BLOCK == 0:
            scales = math.gcd(module.weight.numel() // NF4_BLOCK, NF4_SCALES)
            module.weight = nn.Parameter(to_nf4(module.weight.detach(), NF4_BLOCK, scales), requires_grad=False)
