"""Where a causal LM keeps its decoder layers, their weights and its value projection.

Works from module structure, not from a list of model names. What it does not know raises an error that names the
module: a weight that an estimator could not see is never silently left out.

A layer's weights are of two kinds. A linear layer has one input and one output at every position, so contractions know
its gradient. Other weights (fused experts, their router, a convolution) only have a gradient: directions take it from
autograd, and the exact estimator needs no more.
"""

import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alphatoken.adapters import BASE_LAYER, FACTOR
from alphatoken.errors import UserError

LORA, PATTERN = "lora", "pattern:"


@dataclass(frozen=True)
class ScoredLinear:
    """One linear weight in a decoder layer."""

    name: str  # parameter name, "model.layers.29.self_attn.v_proj.weight"
    module: nn.Module  # nn.Linear, or GPT-2's Conv1D, whose weight is stored (d_in, d_out)
    layer: int

    @property
    def parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module.weight)

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def to_native(self, matrix: torch.Tensor) -> torch.Tensor:
        """(d_out, d_in) to the shape in which the module stores its weight."""
        return matrix.T if self.transposed else matrix

    def from_native(self, matrix: torch.Tensor) -> torch.Tensor:
        """The stored shape to (d_out, d_in)."""
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True)
class ScoredTensor:
    """A weight in a decoder layer that is not one linear layer: its gradient is autograd's."""

    name: str  # parameter name, "model.layers.29.mlp.experts.gate_up_proj"
    module: nn.Module  # fused experts (num_experts, ., .), a router (num_experts, d_in), a convolution (., ., width)
    layer: int

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name.rpartition(".")[2])

    @property
    def described(self) -> str:
        return f"{self.name} of shape {tuple(self.parameter.shape)} in {type(self.module).__name__}"


ScoredWeight = ScoredLinear | ScoredTensor


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM that turns token ids into final hidden states.

    Raises:
        UserError: the decoder layers hang on the model itself.
    """
    if model.base_model is not model:
        return model.base_model
    layers = decoder_layers(model)  # Llama-4 keeps its decoder under another name than transformers looks for
    for child in model.children():
        if child is not layers and any(module is layers for module in child.modules()):
            return child
    raise UserError(f"{type(model).__name__} has no module that gives final hidden states")


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


def layer_weights(model: PreTrainedModel) -> list[list[ScoredWeight]]:
    """Every weight of each decoder layer, in the order of `named_modules`; norms and biases are not weights.

    Of a model with an adapter: the weights that it adds to, whose gradient is that of the merged weights.

    Raises:
        UserError: a layer holds a matrix (or a larger tensor) of an unknown kind.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    result: list[list[ScoredWeight]] = []
    for index, layer in enumerate(decoder_layers(model)):
        weights: list[ScoredWeight] = []
        unknown: list[ScoredTensor] = []
        for module in layer.modules():
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{prefixes[module]}.{key}"
                if FACTOR in name:
                    continue
                if isinstance(module, (nn.Linear, Conv1D)) and key == "weight":
                    weights.append(ScoredLinear(name, module, index))
                elif parameter.dim() < 2 or _is_bias_of_experts(module, key, parameter):
                    continue
                elif _is_convolution(module, key) or _is_routed(module, key, parameter):
                    weights.append(ScoredTensor(name, module, index))
                else:
                    unknown.append(ScoredTensor(name, module, index))
        if unknown:
            raise UserError(
                f"not a kind of weight that AlphaToken knows: {', '.join(weight.described for weight in unknown)}; its "
                "share of every token's value would be left out, so this architecture is not supported yet"
            )
        result.append(weights)
    return result


def _is_convolution(module: nn.Module, key: str) -> bool:
    return isinstance(module, nn.Conv1d) and key == "weight"


def _is_routed(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Fused experts, one matrix each, or the router that chooses among them."""
    if parameter.shape[0] != num_experts(module):
        return False
    return parameter.dim() == 3 or (parameter.dim() == 2 and key == "weight")


def _is_bias_of_experts(module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """gpt-oss: (num_experts, d_out), the bias of each expert."""
    weight = getattr(module, key.removesuffix("_bias"), None) if key.endswith("_bias") else None
    return parameter.dim() == 2 and weight is not None and _is_routed(module, key, weight)


def num_experts(module: nn.Module) -> int | None:
    """Of a module that holds or chooses experts; None for any other."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((count for name in names if isinstance(count := getattr(module, name, None), int)), None)


def layer_linears(model: PreTrainedModel) -> list[list[ScoredLinear]]:
    """The weights of each decoder layer, where all are linear layers.

    Raises:
        UserError: a layer holds a weight of another kind.
    """
    return [_only_linears(weights) for weights in layer_weights(model)]


def _only_linears(weights: list[ScoredWeight]) -> list[ScoredLinear]:
    linears = [weight for weight in weights if isinstance(weight, ScoredLinear)]
    others = [weight.described for weight in weights if isinstance(weight, ScoredTensor)]
    if others:
        raise UserError(
            f"not the weight of a linear layer: {', '.join(others)}; what has no input and output of its own at every "
            "position would be left out of value_propagation, of the Fisher and of --positions response: use "
            "--estimator exact"
        )
    return linears


def first_scored_layer(model: PreTrainedModel, parameters: str) -> int:
    """Index of the first layer with scored weights.

    Raises:
        UserError: last-layers:K with K above the number of layers; as `scored_weights` for lora and patterns.
    """
    if parameters == LORA or parameters.startswith(PATTERN):
        return min(weight.layer for weight in scored_weights(model, parameters))
    count = len(decoder_layers(model))
    if not parameters.startswith("last-layers:"):
        return 0
    last = int(parameters.partition(":")[2])
    if last > count:
        raise UserError(f"--parameters {parameters}: the model has only {count} decoder layers")
    return count - last


def scored_weights(model: PreTrainedModel, parameters: str) -> list[ScoredWeight]:
    """The weights of last-layers:K or all-linear: of linear layers, of experts, routers and convolutions. Those of
    them whose names a pattern finds. The factors of an adapter.

    Raises:
        UserError: K is above the number of layers, a pattern finds nothing or something else, there is no adapter.
    """
    if parameters == "all":
        raise ValueError("'all' is not a set of weights of decoder layers")
    if parameters == LORA:
        return list(_factors(model))
    if parameters.startswith(PATTERN):
        return _matching(model, parameters.removeprefix(PATTERN))
    start = first_scored_layer(model, parameters)
    return [weight for weights in layer_weights(model)[start:] for weight in weights]


def _matching(model: PreTrainedModel, pattern: str) -> list[ScoredWeight]:
    """The weights of decoder layers in whose names the regular expression is found."""
    weights = [weight for layer in layer_weights(model) for weight in layer]
    names = [name for name, _ in model.named_parameters() if FACTOR not in name and re.search(pattern, name)]
    others = sorted(set(names) - {weight.name for weight in weights})
    if others:
        raise UserError(
            f"--parameters {PATTERN}{pattern} finds {', '.join(others[:3])}{' ...' if others[3:] else ''}, which is no "
            "linear weight of a decoder layer: make the pattern narrower"
        )
    if not names:
        raise UserError(
            f"--parameters {PATTERN}{pattern} finds no weight; names are like {weights[0].name} and {weights[-1].name}"
        )
    return [weight for weight in weights if weight.name in set(names)]


def _factors(model: PreTrainedModel) -> list[ScoredLinear]:
    """Both factors of every linear layer that an adapter adds to."""
    prefixes = {module: name for name, module in model.named_modules()}
    found = [
        ScoredLinear(f"{prefixes[module]}.weight", module, index)
        for index, layer in enumerate(decoder_layers(model))
        for module in layer.modules()
        if isinstance(module, nn.Linear) and FACTOR in prefixes[module]
    ]
    if not found:
        raise UserError(
            f"--parameters {LORA}: the model has no LoRA adapter; give the adapter's folder (with adapter_config.json) "
            "as --model"
        )
    return found


def check_adapter(model: PreTrainedModel, name: str) -> None:
    """Raises UserError where an adapter has more than factors of linear layers of the decoder."""
    factors = {factor.name for factor in _factors(model)}
    others = [name for name, _ in model.named_parameters() if FACTOR in name and name not in factors]
    if others:
        raise UserError(
            f"{name}: {others[0]} is no factor of a linear layer of the decoder; merge the adapter into its base model"
        )


def scored_linears(model: PreTrainedModel, parameters: str) -> list[ScoredLinear]:
    """The weights of last-layers:K or all-linear, or of those that a pattern finds, where all are linear layers.

    Raises:
        UserError: a scored layer holds a weight of another kind.
    """
    return _only_linears(scored_weights(model, parameters))


def scored_parameters(model: PreTrainedModel, parameters: str) -> dict[str, nn.Parameter]:
    """Names and parameters of `scored_weights`, or all: with norms, biases, embeddings and head, without factors."""
    if parameters == "all":
        return {name: parameter for name, parameter in model.named_parameters() if FACTOR not in name}
    return {weight.name: weight.parameter for weight in scored_weights(model, parameters)}


def value_rows(linear: ScoredLinear, model: PreTrainedModel) -> torch.Tensor | None:
    """Indices of the output features of `linear` that are attention values; None where it holds none.

    Raises:
        UserError: a fused projection of an unknown layout.
    """
    config = model.config.get_text_config()
    short = linear.name.replace(BASE_LAYER, "").split(".")[-2]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    out_features = linear.parameter.shape[1 if linear.transposed else 0]
    if short == "v_proj":
        return torch.arange(out_features)
    if short == "qkv_proj":  # Phi-3: queries, then keys, then values
        kv_width = getattr(config, "num_key_value_heads", heads) * width
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
