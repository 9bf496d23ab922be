"""A trunk of fewer bits: the layers below the first scored one, through which no gradient passes.

    weights of linear layers    int8, one scale per output channel (torchao's Int8WeightOnlyConfig)
    everything else             as it was: embedding, norms, scored layers, head; experts in one 3-D parameter

Activations keep their dtype, so estimators see nothing of it but hidden states that differ a little.
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from alphatoken.architecture import decoder_layers, first_scored_layer
from alphatoken.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedTrunk:
    """What a model's trunk is turned into as it is loaded."""

    dtype: str  # int8
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
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise UserError(
                f"--trunk-dtype {self.dtype} needs torchao: pip install 'alphatoken[quantize]'"
            ) from error
        for layer, device in zip(trunk, devices, strict=False):
            quantize_(layer, Int8WeightOnlyConfig(), device=device)
        logger.info("the first %d of %d layers have %s weights", first, len(decoder_layers(model)), self.dtype)
