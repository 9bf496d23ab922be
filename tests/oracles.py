"""Slow, obvious float64 definitions that every fast path is tested against. One row, one token at a time."""

import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def double(model):
    """A float64 copy with eager attention and gradients on every parameter."""
    import copy

    twin = copy.deepcopy(model).to(torch.float64)
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("eager")
    return twin.eval().requires_grad_(True)


def token_losses(model, ids: list[int], mask: list[bool]) -> torch.Tensor:
    """Loss of every response token of one row, from the model's own logits."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].to(torch.float64)
    losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[torch.tensor(mask[1:])]


def gradient(model, loss: torch.Tensor, names: list[str], keep: bool = False) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [parameters[n] for n in names], retain_graph=keep, allow_unused=True)
    return {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def mean_gradient(model, rows, names: list[str], weight=lambda token: 1.0) -> dict[str, torch.Tensor]:
    """Gradient of the weighted mean loss over all response tokens of all rows."""
    total = {name: 0.0 for name in names}
    weights = 0.0
    for ids, mask in zip(*rows, strict=True):
        w = torch.tensor([weight(token) for token, m in zip(ids[1:], mask[1:], strict=True) if m], dtype=torch.float64)
        for name, g in gradient(model, (token_losses(model, ids, mask) * w).sum(), names).items():
            total[name] = total[name] + g
        weights += float(w.sum())
    return {name: g / weights for name, g in total.items()}


def exact_values(model, rows, tangent: dict[str, torch.Tensor]) -> torch.Tensor:
    """<grad l_t, M> by one backward pass per response token, over all rows in order."""
    values = []
    for ids, mask in zip(*rows, strict=True):
        losses = token_losses(model, ids, mask)
        for t in range(len(losses)):
            g = gradient(model, losses[t], list(tangent), keep=True)
            values.append(sum((g[name] * tangent[name].to(torch.float64)).sum() for name in tangent))
    return torch.stack(values).detach()


def gated_delta_rule(query, key, value, g, beta, **_) -> tuple[torch.Tensor, None]:
    """Qwen3-Next's linear attention token by token, BTHD: S = exp(g) S, S += k (b (v - S^T k))^T, output S^T q."""
    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    state = query.new_zeros(query.shape[0], *query.shape[2:], value.shape[-1])
    outputs = []
    for t in range(query.shape[1]):
        k, q = key[:, t, :, :, None], query[:, t, :, :, None]
        state = state * g[:, t, :, None, None].exp()
        new = (value[:, t] - (state * k).sum(-2)) * beta[:, t, :, None]
        state = state + k * new[..., None, :]
        outputs.append((state * q).sum(-2))
    return torch.stack(outputs, 1), None


def captures(model, ids: list[int], mask: list[bool], names: list[str]):
    """(h by name TD_in, delta by name TD_out, attention by layer HTT) of one row, delta from the summed loss."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    h, out, handles = {}, {}, []
    for name, module in modules.items():

        def hook(_, args, output, name=name):
            h[name], out[name] = args[0][0].detach(), output

        handles.append(module.register_forward_hook(hook))
    result = model(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    losses = F.cross_entropy(result.logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    deltas = torch.autograd.grad(losses[torch.tensor(mask[1:])].sum(), [out[name] for name in names])
    return h, {n: d[0] for n, d in zip(names, deltas, strict=True)}, [a[0].detach() for a in result.attentions]


def positions(mask: list[bool]) -> list[int]:
    """Network positions that predict a response token."""
    return [t - 1 for t in range(1, len(mask)) if mask[t]]


def cross_products(model, rows, validation, names, layer_of, value_rows, window, head_average=True):
    """Eqs. 8 and 9 token by token against every validation token: (direct N, causal N)."""
    validation_tokens = []
    for ids, mask in zip(*validation, strict=True):
        h, delta, _ = captures(model, ids, mask, names)
        validation_tokens += [({n: delta[n][v] for n in names}, {n: h[n][v] for n in names}) for v in positions(mask)]
    direct, causal = [], []
    for ids, mask in zip(*rows, strict=True):
        h, delta, attention = captures(model, ids, mask, names)
        average = [a.mean(0) for a in attention]
        for p in positions(mask):
            d = c = 0.0
            for delta_v, h_v in validation_tokens:
                for n in names:
                    d += (delta[n][p] @ delta_v[n]) * (h[n][p] @ h_v[n])
                    if value_rows.get(n) is not None:
                        rows_v = value_rows[n]
                        for k in range(p + 1, min(p + window, len(ids) - 1) + 1):
                            inner = delta[n][k][rows_v] @ delta_v[n][rows_v]
                            c += average[layer_of[n]][k, p] * inner * (h[n][p] @ h_v[n])
            direct.append(d / len(validation_tokens))
            causal.append(c / len(validation_tokens) if isinstance(c, torch.Tensor) else torch.tensor(0.0).double())
    return torch.stack(direct), torch.stack(causal)


def linear_matrix(model, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The stored shape to (d_out, d_in)."""
    return tensor.T if isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D) else tensor


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error against the largest expected size."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
