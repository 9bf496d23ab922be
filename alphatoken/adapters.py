"""LoRA adapters as PEFT writes them: a folder with adapter_config.json, which names the base model.

    W x + s B A x        W is frozen, the factors A and B are trained

An adapter is put into its base model, whose layers then hold `base_layer` and the factors. Quick to import: CPU tasks
need no model code.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
FACTOR = ".lora_"  # in the names of an adapter's own parameters
BASE_LAYER = ".base_layer"  # in the names of the weights that it adds to
# What an adapter may train beside low-rank factors of linear layers. Values would be about a part of it.
MORE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
        "lora_bias", "alora_invocation_tokens")  # fmt: skip


def is_adapter(name: str) -> bool:
    """Whether `name` is a folder with an adapter and no model of its own.

    A config.json is no model: some trainers put that of the base model beside the adapter.
    """
    if not Path(name, ADAPTER_CONFIG).is_file():
        return False
    return not any(next(Path(name).glob(pattern), None) for pattern in MODEL_WEIGHTS)


def base_of(name: str) -> str:
    """The base model of an adapter folder; every other name or folder unchanged.

    Raises:
        UserError: the adapter does not name one.
    """
    if not is_adapter(name):
        return name
    base = _config(name).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{name}: {ADAPTER_CONFIG} names no base model; write its folder as base_model_name_or_path")
    beside = Path(name, base)  # a path in the configuration may be meant from where it lies
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


def with_adapter(model: "PreTrainedModel", folder: str) -> "PreTrainedModel":
    """The base model with the adapter of `folder` in its layers.

    Raises:
        UserError: PEFT is missing, or the adapter is not LoRA of linear layers of the decoder alone.
    """
    config = _config(folder)
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise UserError(f"{folder} is a {kind} adapter; LoRA adapters can be scored: merge it into its base model")
    more = [name for name in MORE if config.get(name)]
    if more or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder}: the adapter has {', '.join(more) or 'bias'}, which cannot be scored; merge it into its base "
            "model and score that"
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"{folder} is a LoRA adapter, which needs peft: pip install 'alphatoken[train]'") from error
    try:
        wrapped = PeftModel.from_pretrained(model, folder, torch_device="cpu", autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the adapter {folder}: {first_line(error)}") from error
    return wrapped.get_base_model()


def resolve_base(name: str) -> str:
    """Folder or hub name of the whole model behind `name`: of the embedded model, of an adapter's base, or itself."""
    return resolve_model(base_of(name))


def _config(folder: str) -> dict:
    try:
        found = json.loads(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder}: {ADAPTER_CONFIG} is no JSON object")
    return found
