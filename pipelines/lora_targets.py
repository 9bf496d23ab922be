"""Whether the layers that --lora-targets names are there: known from the model's layout, before a worker starts."""

import logging

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alphatoken.errors import UserError, first_line
from alphatoken.plan_model import meta_model
from alphatoken.train_config import TrainConfig

logger = logging.getLogger(__name__)


def check_lora_targets(config: TrainConfig) -> None:
    """Raises UserError for a name that no layer has. PEFT itself ignores it beside others that fit."""
    if not config.lora_targets:
        return
    try:
        model = meta_model(config.model, config.trust_remote_code)
    except Exception as error:  # code that comes with a checkpoint may not run without weights; the workers have them
        logger.info("--lora-targets could not be checked before the workers start: %s", first_line(error))
        return
    layers = _layers(model)
    # As PEFT reads a list: a layer's whole name, or its last parts.
    unknown = [
        target for target in config.lora_targets if not any(f".{name}".endswith(f".{target}") for name in layers)
    ]
    if unknown:
        linear = dict.fromkeys(
            name.rpartition(".")[2] for name, layer in layers.items() if isinstance(layer, torch.nn.Linear | Conv1D)
        )
        raise UserError(
            f"--lora-targets: no layer of {config.model} is called {', '.join(unknown)}; its linear layers are "
            f"{', '.join(linear)}"
        )


def _layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Modules with a matrix of their own, by name: norms and what only holds other modules get no adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }
