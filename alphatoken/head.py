"""Losses at the positions that predict a response token, and their gradient, without keeping logits.

With z = W h + b the logits of one position and y its target:

    l = logsumexp(z) - z[y],    dl/dh = W^T (softmax(z) - onehot(y)),    l' along (h', W') = dl/dh . h' + dl/dW . W'

Rows are processed in chunks, so memory does not grow with rows x vocabulary.
N response tokens, D hidden width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from alphatoken.architecture import decoder
from alphatoken.attention import settle_attention
from alphatoken.errors import UserError

CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MB in float32


@dataclass
class HeadOutput:
    """What was asked for; the rest is None. Losses in nats, float32 (float64 for float64 models)."""

    losses: torch.Tensor  # N
    hidden_gradient: torch.Tensor | None = None  # ND, d loss / d hidden, the model's dtype
    entropy: torch.Tensor | None = None  # N, nats
    weight_tangent: torch.Tensor | None = None  # N, derivative of each loss along tangents of the head's own weights


class LossHead:
    """The output projection of a causal LM with its logit post-processing."""

    def __init__(self, model: PreTrainedModel) -> None:
        projection = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear):
            raise UserError(f"the output head of {type(model).__name__} is {type(projection).__name__}, not a Linear")
        config = model.config.get_text_config()
        self.projection = projection
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale: float = _logit_scale(config)

    @torch.no_grad()
    def __call__(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        gradient: bool = False,
        entropy: bool = False,
        weight_gradient: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        tangents: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> HeadOutput:
        """Losses of `targets` (N) from final hidden states (ND).

        Args:
            gradient: also d loss / d hidden of every row.
            entropy: also the predictive entropy.
            weight_gradient: VD float32 buffer; the gradient of sum(token_weights * losses) is added to it.
            token_weights: N, for `weight_gradient`; default 1.
            tangents: (W' VD, b' V or None); gives `weight_tangent`.
        """
        total, vocabulary = hidden.shape[0], self.projection.weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out = HeadOutput(hidden.new_empty(total, dtype=wide))
        if gradient:
            out.hidden_gradient = torch.empty_like(hidden)
        if entropy:
            out.entropy = hidden.new_empty(total, dtype=wide)
        if tangents is not None:
            out.weight_tangent = hidden.new_empty(total, dtype=wide)
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        projection = (self.projection.weight.to(hidden.dtype), self.projection.bias)  # mixed precision: one copy
        for start in range(0, total, step):
            rows = slice(start, start + step)
            self._chunk(hidden[rows], targets[rows], rows, projection, out, weight_gradient, token_weights, tangents)
        return out

    def _chunk(self, hidden, targets, rows, projection, out, weight_gradient, token_weights, tangents) -> None:
        weight, bias = projection
        logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).to(out.losses.dtype)
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        normalizer = torch.logsumexp(logits, dim=-1)
        target_logits = logits.gather(-1, targets[:, None]).squeeze(-1)
        out.losses[rows] = normalizer - target_logits
        wants_gradient = out.hidden_gradient is not None or weight_gradient is not None or tangents is not None
        if not wants_gradient and out.entropy is None:
            return
        slope = self._slope(logits)
        probabilities = torch.sub(logits, normalizer[:, None], out=None if out.entropy is not None else logits).exp_()
        if out.entropy is not None:
            out.entropy[rows] = normalizer - (probabilities * logits).sum(-1)
        if not wants_gradient:
            return
        difference = probabilities  # softmax - onehot, then d loss / d (W h + b)
        difference[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        if slope is not None:
            difference *= slope
        narrow = difference.to(hidden.dtype)
        if out.hidden_gradient is not None:
            torch.matmul(narrow, weight, out=out.hidden_gradient[rows])
        if weight_gradient is not None:
            weighted = narrow if token_weights is None else narrow * token_weights[rows, None].to(narrow.dtype)
            weight_gradient += (weighted.T @ hidden).to(weight_gradient.dtype)
        if tangents is not None:
            weight_tangent, bias_tangent = tangents
            along = (narrow @ weight_tangent.to(narrow.dtype) * hidden).sum(-1, dtype=out.losses.dtype)
            if bias_tangent is not None:
                along += difference @ bias_tangent.to(difference.dtype)
            out.weight_tangent[rows] = along

    def _slope(self, logits: torch.Tensor) -> torch.Tensor | float | None:
        """d (processed logits) / d (W h + b); None where it is one."""
        if self.softcap is not None:
            return self.scale * (1.0 - (logits / self.softcap) ** 2)
        return None if self.scale == 1.0 else self.scale


class TrainedLosses(torch.autograd.Function):
    """(losses N, d loss / d hidden ND): LossHead in a training graph.

    The forward pass already has the gradient with respect to the hidden states, so the backward pass only weights its
    rows. The head's own weight gets its gradient from the rows whose loss is used, whose logits are computed again:
    nothing of size N x V is kept, and a dropped token costs nothing.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: LossHead):
        narrow = hidden.to(_compute_dtype(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            out = head(narrow, targets, gradient=True)
        assert out.hidden_gradient is not None
        ctx.head = head
        ctx.save_for_backward(narrow, targets, out.hidden_gradient)
        gradient = out.hidden_gradient.to(hidden.dtype)
        ctx.mark_non_differentiable(gradient)
        return out.losses, gradient

    @staticmethod
    def backward(ctx, upstream: torch.Tensor, _: torch.Tensor):
        hidden, targets, gradient = ctx.saved_tensors
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            hidden_gradient = gradient.to(upstream.dtype) * upstream[:, None]
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(ctx.head.projection.weight)
            used = upstream != 0
            with torch.autocast(hidden.device.type, enabled=False):
                ctx.head(
                    hidden[used], targets[used], weight_gradient=weight_gradient, token_weights=upstream[used]
                )  # fmt: skip
        return hidden_gradient, weight_gradient, None, None


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What a matrix product of `tensor` is computed in here: autocast's dtype where it is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _logit_scale(config) -> float:
    """Granite divides its logits, Cohere multiplies them."""
    if getattr(config, "logits_scaling", None):
        return 1.0 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0


@torch.no_grad()
def check_head(model: PreTrainedModel, head: LossHead) -> None:
    """Compare with the model's own logits on a few tokens, so that an unknown head cannot give wrong values.

    Raises:
        UserError: the model does something to its logits that LossHead does not know.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=head.projection.weight.device)[None] % vocabulary
    settle_attention(model, ids)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    expected = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    losses = head(hidden, ids[0, 1:]).losses.float()
    tolerance = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 5e-2
    if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance):
        raise UserError(
            f"the output head of {type(model).__name__} changes its logits in a way that AlphaToken does not know: "
            f"losses differ by up to {(losses - expected).abs().max():.2g} from the model's own"
        )
