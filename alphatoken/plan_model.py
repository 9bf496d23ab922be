"""The models and the method of a plan: structure from configurations, on torch's meta device, without weights."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from alphatoken import storage, tensor_file
from alphatoken.adapters import base_of, is_adapter
from alphatoken.architecture import (
    ScoredLinear,
    ScoredWeight,
    check_value_projections,
    first_scored_layer,
    layer_weights,
    scored_linears,
    value_rows,
)
from alphatoken.attention import NAME as ATTENTION
from alphatoken.errors import UserError, first_line
from alphatoken.exact import choose_method
from alphatoken.experts import is_routed
from alphatoken.float8 import fits_float8, refuse_float8
from alphatoken.last_layer import local_linears
from alphatoken.model import resolve_dtype
from alphatoken.plan import LayerShape, Method, ModelShape, Work, scoring_flops
from alphatoken.plan_config import PlanConfig
from alphatoken.plan_memory import Memory, actor_memory
from alphatoken.scoring import default_parameters
from alphatoken.tangent_linear import wide_products
from alphatoken.targets import target_names
from alphatoken.tokenizer import load_config


@dataclass(frozen=True)
class PlannedRun:
    """The models and the method that were asked for."""

    model: ModelShape
    reference: ModelShape | None
    method: Method
    parameters: str | None  # what is scored; None for a baseline
    dtype: str
    pairs: bool
    keeps_reference: bool

    @property
    def method_name(self) -> str:
        return {"plain": "forward pass", "central": "central difference", "forward": "forward mode"}.get(
            self.method.kind, "contraction"
        )

    def score(self, work: Work) -> float:
        """Operations of scoring `work`."""
        return scoring_flops(self.model, self.method, work, self.reference if self.keeps_reference else None)

    def memory(self, work: Work, on_cpu: bool) -> Memory:
        return actor_memory(
            self.model, self.method, work, self.dtype, on_cpu, self.reference, self.keeps_reference
        )  # fmt: skip


def read_run(config: PlanConfig, pairs: bool) -> PlannedRun:
    """Raises UserError for an adapter, a model or a file that cannot be planned with."""
    if is_adapter(config.model):
        raise UserError(
            f"{config.model} is a LoRA adapter, and a plan is of whole models: give --model {base_of(config.model)}; "
            "the adapter adds next to nothing to it"
        )
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    dtype = resolve_dtype(config.dtype, device)
    valued = config.estimator in ("exact", "value_propagation")
    parameters = _parameters(config) if valued else None
    kind: Any = config.estimator
    if kind == "exact":
        kind = choose_method(config.method, dtype, config.tangent_dtype)
    model = meta_model(config.model, config.trust_remote_code)
    if config.estimator == "value_propagation" and parameters:
        check_value_projections(scored_linears(model, parameters), model)
    shape = shape_of(model, values=config.estimator == "value_propagation")
    if config.tangent_dtype and not any(layer.float8_weights for layer in shape.layers):
        raise refuse_float8(model)
    reference = None
    if config.reference_model and config.reference_model != config.model:
        reference = shape_of(meta_model(config.reference_model, config.trust_remote_code))
    elif config.reference_model and config.estimator == "excess_loss":
        reference = shape  # loaded a second time
    targets, float8 = _targets(config), config.tangent_dtype == "float8"
    wide = wide_products(device, dtype) and not float8
    method = Method(
        kind=kind if valued else "plain",
        first_layer=_first_layer(model, parameters),
        directions=targets + bool(valued and config.fisher),
        shared_pass=targets > 1 and not wide and not float8,
        every_parameter=parameters == "all",
        window=config.window,
        wide_tangents=wide,
        float8_tangents=float8,
        entropy=config.estimator == "entropy",
        plain_passes=int(pairs and kind == "central"),
        response_outer=config.estimator == "value_propagation",
    )
    name = str(dtype).removeprefix("torch.")
    return PlannedRun(shape, reference, method, parameters, name, pairs, pairs or config.estimator == "excess_loss")


def _parameters(config: PlanConfig) -> str:
    """What is scored: as asked, else as the direction says or a Fisher that is there, else the estimator's default."""
    parameters = config.parameters
    for path, kind in ((config.direction, "direction"), (config.fisher, "fisher")):
        if path and (kind == "direction" or storage.exists(path)):
            found = tensor_file.read_provenance(path, kind).parameters
            parameters = parameters or found
            if found != parameters:
                raise UserError(f"{path} covers --parameters {found}, not {parameters}; make it again")
    return parameters or default_parameters(config.estimator)


def _targets(config: PlanConfig) -> int:
    """How many directions adaptation is along."""
    named = target_names(config.validation)
    if config.direction:
        named = list(tensor_file.read_provenance(config.direction, "direction").targets)
    return max(1, len(named))


def _first_layer(model: PreTrainedModel, parameters: str | None) -> int:
    return 0 if parameters in (None, "all") else first_scored_layer(model, parameters)


def meta_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without storage for its weights, from its configuration. Raises UserError where there is none."""
    config = load_config(name, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=trust_remote_code, dtype=torch.bfloat16
            )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make model {name!r} from its configuration: {first_line(error)}") from error
    model.set_attn_implementation(ATTENTION)  # now: some models know no other than their own when they are made
    if is_routed(model):
        model.set_experts_implementation("batched_mm")  # the default looks at how tensors lie in memory
    return model


def shape_of(model: PreTrainedModel, values: bool = False) -> ModelShape:
    """values: also where attention values are made. Raises UserError for an architecture that is not known."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = [_layer_shape(weights, model, values) for weights in layer_weights(model)]
    layers[-1] = replace(layers[-1], local_products=_local_products(model))
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(parameters, hidden, vocabulary, heads, heads * width, tuple(layers))


def _local_products(model: PreTrainedModel) -> int:
    """Of what last_layer.py leaves out; 0 where the meta device cannot run the model."""
    try:
        return sum(cast(nn.Linear, module).weight.numel() for module in local_linears(model))
    except (RuntimeError, ValueError):
        return 0


def _layer_shape(weights: list[ScoredWeight], model: PreTrainedModel, values: bool) -> LayerShape:
    sizes = [_sizes(weight, model) for weight in weights]
    value_width = value_products = 0
    for weight, (_, d_in, _) in zip(weights, sizes, strict=True):
        rows = value_rows(weight, model) if values and isinstance(weight, ScoredLinear) else None
        if rows is not None:
            value_width += len(rows)
            value_products += len(rows) * d_in
    return LayerShape(
        weights=sum(weight.parameter.numel() for weight in weights),
        products=sum(d_out * d_in * used for d_out, d_in, used in sizes),
        inputs=sum(d_in * used for _, d_in, used in sizes),
        outputs=sum(d_out * used for d_out, _, used in sizes),
        widest=max(max(d_out, d_in) for d_out, d_in, _ in sizes),
        value_width=value_width,
        value_products=value_products,
        float8_weights=sum(weight.parameter.numel() for weight in weights if _takes_float8(weight)),
    )


def _takes_float8(weight: ScoredWeight) -> bool:
    return type(weight.module) is nn.Linear and fits_float8(weight.parameter)


def _sizes(weight: ScoredWeight, model: PreTrainedModel) -> tuple[int, int, int]:
    """(d_out, d_in, how many such matrices a position is multiplied with). Of fused experts: those it is routed to."""
    shape = tuple(weight.parameter.shape)
    if isinstance(weight, ScoredLinear):
        d_out, d_in = weight.from_native(weight.parameter).shape
        return d_out, d_in, 1
    if isinstance(weight.module, nn.Conv1d):  # d_out, channels of a group, width of the kernel
        return shape[0], shape[1] * shape[2], 1
    if len(shape) == 2:  # a router
        return *shape, 1
    return shape[1], shape[2], getattr(model.config.get_text_config(), "num_experts_per_tok", None) or shape[0]
