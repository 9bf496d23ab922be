"""Where a causal LM keeps its decoder layers, their linear weights and its value projection.

Works from module structure, not from a list of model names. What it does not know raises an error that names the
module: a weight that an estimator could not see is never silently left out.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alphatoken.errors import UserError


@dataclass(frozen=True)
class ScoredLinear:
    """One linear weight in a decoder layer."""

    name: str  # parameter name, "model.layers.29.self_attn.v_proj.weight"
    module: nn.Module  # nn.Linear, or GPT-2's Conv1D, whose weight is stored (d_in, d_out)
    layer: int

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def to_native(self, matrix: torch.Tensor) -> torch.Tensor:
        """(d_out, d_in) to the shape in which the module stores its weight."""
        return matrix.T if self.transposed else matrix

    def from_native(self, matrix: torch.Tensor) -> torch.Tensor:
        """The stored shape to (d_out, d_in)."""
        return matrix.T if self.transposed else matrix


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        UserError: there is not exactly one list with `num_hidden_layers` entries.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.rsplit(".", 1)[-1] in ("layers", "h")
    ]
    if len(found) != 1:
        raise UserError(
            f"cannot find the decoder layers of {type(model).__name__}: expected one list 'layers' or 'h' of {count} "
            f"modules, found {[name for name, _ in found] or 'none'}"
        )
    return found[0][1]


def layer_linears(model: PreTrainedModel) -> list[list[ScoredLinear]]:
    """Every linear weight of each decoder layer, in the order of `named_modules`.

    Raises:
        UserError: a layer holds a matrix (or fused expert tensor) that is not the weight of a Linear or Conv1D.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    result = []
    for index, layer in enumerate(decoder_layers(model)):
        linears = [
            ScoredLinear(f"{prefixes[module]}.weight", module, index)
            for module in layer.modules()
            if isinstance(module, (nn.Linear, Conv1D))
        ]
        known = {linear.name for linear in linears}
        unseen = {
            f"{prefixes[layer]}.{name}": parameter
            for name, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and f"{prefixes[layer]}.{name}" not in known
        }
        if unseen:
            described = ", ".join(
                f"{name} of shape {tuple(parameter.shape)} in {_owner(model, name)}"
                for name, parameter in unseen.items()
            )
            raise UserError(
                f"not the weight of a linear layer that AlphaToken knows: {described}; its share of every token's "
                "value would be left out, so this architecture is not supported yet"
            )
        result.append(linears)
    return result


def _owner(model: PreTrainedModel, parameter: str) -> str:
    return type(model.get_submodule(parameter.rpartition(".")[0])).__name__


def first_scored_layer(model: PreTrainedModel, parameters: str) -> int:
    """Index of the first layer with scored weights.

    Raises:
        UserError: last-layers:K with K above the number of layers.
    """
    count = len(decoder_layers(model))
    if not parameters.startswith("last-layers:"):
        return 0
    last = int(parameters.partition(":")[2])
    if last > count:
        raise UserError(f"--parameters {parameters}: the model has only {count} decoder layers")
    return count - last


def scored_linears(model: PreTrainedModel, parameters: str) -> list[ScoredLinear]:
    """The linear weights of last-layers:K or all-linear."""
    if parameters == "all":
        raise ValueError("'all' is not a set of linear weights")
    start = first_scored_layer(model, parameters)
    return [linear for linears in layer_linears(model)[start:] for linear in linears]


def scored_parameters(model: PreTrainedModel, parameters: str) -> dict[str, nn.Parameter]:
    """Names and parameters of last-layers:K, all-linear, or all (norms, biases, embeddings and head included)."""
    if parameters == "all":
        return dict(model.named_parameters())
    return {linear.name: linear.module.weight for linear in scored_linears(model, parameters)}


def value_rows(linear: ScoredLinear, model: PreTrainedModel) -> torch.Tensor | None:
    """Indices of the output features of `linear` that are attention values; None where it holds none.

    Raises:
        UserError: a fused projection of an unknown layout.
    """
    config = model.config.get_text_config()
    short = linear.name.split(".")[-2]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    out_features = linear.module.weight.shape[1 if linear.transposed else 0]
    if short == "v_proj":
        return torch.arange(out_features)
    if short == "qkv_proj":  # Phi-3: queries, then keys, then values
        kv_width = config.num_key_value_heads * width
        if out_features == heads * width + 2 * kv_width:
            return torch.arange(out_features - kv_width, out_features)
    elif short == "c_attn" and linear.transposed:  # GPT-2: three equal parts
        return torch.arange(2 * out_features // 3, out_features)
    elif short == "query_key_value" and config.model_type == "gpt_neox":  # per head: query, key, value
        return torch.arange(out_features).view(heads, 3, width)[:, 2].reshape(-1)
    elif not any(mark in short for mark in ("qkv", "query_key_value", "c_attn", "Wqkv")):
        return None
    raise UserError(
        f"{linear.name} in {type(linear.module).__name__} fuses query, key and value in a layout that "
        "value_propagation does not know; use --estimator exact, which needs no knowledge of attention"
    )


def check_value_projections(linears: list[ScoredLinear], model: PreTrainedModel) -> None:
    """Every scored layer must have exactly one place where attention values are made.

    Raises:
        UserError: naming the layer that has none (linear attention, say) or several.
    """
    for layer in sorted({linear.layer for linear in linears}):
        found = [x.name for x in linears if x.layer == layer and value_rows(x, model) is not None]
        if len(found) != 1:
            name = type(decoder_layers(model)[layer]).__name__
            raise UserError(
                f"layer {layer} ({name}) has {len(found)} value projections {found}; value_propagation needs one: "
                "use --estimator exact, which needs no knowledge of attention"
            )
