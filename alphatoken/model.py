"""Loading a model for scoring, and telling one checkpoint from another."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken.adapters import base_of, is_adapter, with_adapter
from alphatoken.architecture import check_adapter, decoder_layers
from alphatoken.attention import NAME as ATTENTION
from alphatoken.batching import Batch
from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError, first_line
from alphatoken.head import LossHead, check_head
from alphatoken.last_layer import local_linears, predicting_states
from alphatoken.quantized_trunk import QuantizedTrunk
from alphatoken.spread_trunk import SpreadTrunk

FINGERPRINT_SAMPLES = 2**16  # elements read per tensor: enough to see any training step, quick on a large model


@dataclass(frozen=True)
class ScoringModel:
    """A model in eval mode with frozen weights, and its loss head."""

    model: PreTrainedModel
    head: LossHead
    local: tuple[nn.Module, ...] = ()  # of last_layer.py

    @property
    def device(self) -> torch.device:
        return self.head.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.projection.weight.dtype

    def predicting_states(self, batch: Batch) -> torch.Tensor:
        """Final hidden states at the predicting positions: ND."""
        return predicting_states(self.model, self.local, batch)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def planned_dtype(dtype: str, gpus: float) -> str:
    """The name of what `resolve_dtype` gives in a process that has so many GPUs, or part of one."""
    return str(resolve_dtype(dtype, torch.device("cuda" if gpus else "cpu"))).removeprefix("torch.")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str,
    dtype: str = "auto",
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    trunk: QuantizedTrunk | None = None,
    spread: SpreadTrunk | None = None,
) -> ScoringModel:
    """A causal LM from a folder or hub name, or an adapter folder's base model with the adapter in it, ready to score.

    Args:
        name: also `smollm2-135m-instruct`, the embedded model.
        dtype: float32, bfloat16, auto: bfloat16 on a GPU, float32 on a CPU; or stored: that of the checkpoint.
        device: default: the GPU where there is one.
        trunk: what becomes of the layers that are not scored; default: nothing.
        spread: over which devices they go, `device` being the first; default: all are on `device`.

    Raises:
        UserError: it cannot be loaded, its output head is of an unknown kind, or it has no such trunk.
    """
    device = device or default_device()
    base = base_of(resolve_model(name))
    try:
        wanted = "auto" if dtype == "stored" else resolve_dtype(dtype, device)  # what transformers calls auto
        model = _from_pretrained(base, wanted, trust_remote_code)
    except (OSError, ValueError) as error:
        what = f"model {name!r}" if base == resolve_model(name) else f"{base!r}, the base model of adapter {name!r}"
        raise UserError(f"cannot load {what}: {first_line(error)}") from error
    if is_adapter(name):
        model = with_adapter(model, name)
        check_adapter(model, name)
    places = spread.layer_devices(model) if spread else []
    if trunk:
        model.checkpoint_fingerprint = fingerprint(model)
        trunk.apply(model, places or [device] * len(decoder_layers(model)))
    if spread:
        spread.apply(model, places)
    else:
        model.to(device)
    return prepare_model(model)


def _from_pretrained(name: str, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """With our attention; with eager attention where a model knows no other than its own (Falcon, GPT-J ...).

    Such a model looks its attention up in a table of names. `prepare_model` then tells it ours, as any other.
    """
    folder = resolve_model(name)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, **options)
    except KeyError as error:
        if error.args != (ATTENTION,):
            raise
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def prepare_model(model: PreTrainedModel) -> ScoringModel:
    """Freeze a loaded model, switch dropout off, route its attention through ours and check its head."""
    model.eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    head = LossHead(model)
    check_head(model, head)
    return ScoringModel(model, head, local_linears(model))


def fingerprint(model: nn.Module) -> str:
    """Identifies a checkpoint by samples of every weight in bfloat16: the same in whatever dtype it is loaded.

    What configuration and tokenizer say is not in it: see `checkpoint_files.settings_fingerprint`.
    """
    known = getattr(model, "checkpoint_fingerprint", None)  # of one whose trunk was quantised since
    if known:
        return str(known)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::stride].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # of an adapter: what its product is multiplied by
            digest.update(f"{name}{sorted(scaling.items())}".encode())
    return digest.hexdigest()[:32]
