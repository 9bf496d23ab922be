"""Final hidden states at the predicting positions alone.

In the last decoder layer a position reaches others through its key and value. Its query and all that follows attention
stay where they are, so before a row's first predicting position and after its last they are left out. There the layer
puts out something that nobody reads; losses, gradients and tangents of response tokens are those of the whole layer.

B rows, T positions, N response tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from alphatoken.architecture import ScoredLinear, decoder, layer_weights
from alphatoken.attention import recording
from alphatoken.batching import Batch
from alphatoken.replaced_forward import replaced_forward

PROBE = (1, 2, 3, 4)  # token ids


def predicting_states(model: PreTrainedModel, local: Sequence[nn.Module], batch: Batch) -> torch.Tensor:
    """ND. local: what `local_linears` has found."""
    shape, places = batch.input_ids.shape, batch.span_places
    with replaced_forward({module: _narrow(module.forward, shape, places) for module in local}):
        hidden = decoder(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden[batch.predicting]


def local_linears(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Linears of the last layer whose output at a position reaches no other position.

    Such a one is not below the layer's keys and values in autograd's graph, and the gradient of later positions at its
    output is zero. None where the layer does not use transformers' attention interface.
    """
    weights = layer_weights(model)[-1]
    linears = [weight.module for weight in weights if isinstance(weight, ScoredLinear)]
    last = model.config.get_text_config().num_hidden_layers - 1
    ids = torch.tensor([PROBE], device=model.device)
    options = {}
    if ids.is_meta:  # without a mask of its own, transformers looks at values
        options = {"attention_mask": ids.new_ones((1, 1, len(PROBE), len(PROBE)), dtype=torch.bool)}
    outputs: dict[nn.Module, torch.Tensor] = {}

    def keep(module, args, output) -> None:
        if isinstance(output, torch.Tensor) and output.shape[:-1] == ids.shape:  # not one that sees routed positions
            outputs[module] = output if output.requires_grad else output.requires_grad_()

    hooks = [module.register_forward_hook(keep) for module in linears]
    try:
        with torch.enable_grad(), recording({last}) as attention:
            hidden = decoder(model)(input_ids=ids, use_cache=False, **options).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    if last not in attention:
        return ()
    made = list(outputs.values())
    seen = [attention[last].key, attention[last].value]
    below = torch.autograd.grad(seen, made, [torch.ones_like(x) for x in seen], retain_graph=True, allow_unused=True)
    after = hidden[:, 1:]
    upstream = torch.randn(after.shape, generator=torch.Generator().manual_seed(0)).to(after)
    later = torch.autograd.grad(after, made, upstream, allow_unused=True)
    return tuple(
        module
        for module, graph, gradient in zip(outputs, below, later, strict=True)
        if graph is None and (gradient is None or gradient.is_meta or not gradient[:, 0].any())
    )


def _narrow(forward, shape: torch.Size, places: torch.Tensor):
    """places: int64, into the B * T positions. The output is zero everywhere else."""

    def narrow(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1] != shape:
            return forward(x)
        found = forward(x.flatten(0, 1)[places])
        whole = found.new_zeros(shape.numel(), found.shape[-1]).index_copy(0, places, found)
        return whole.view(*shape, -1)

    return narrow
