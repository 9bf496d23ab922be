"""Value propagation against the paper's cross-product definition in float64."""

import pytest
import torch
from oracles import cross_products, double, linear_matrix, relative_error
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, MORE_DENSE, random_rows, tiny_model

from alphatoken.architecture import scored_linears, value_rows
from alphatoken.batching import make_batch
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.model import prepare_model
from alphatoken.value_propagation import ValuePropagation


def paper_direction(scoring, parameters, rows):
    options = GradientOptions(parameters=parameters, positions="response")
    return mean_gradient(scoring, [make_batch(*rows)], options).tensors


@pytest.mark.parametrize("parameters", ["last-layers:1", "last-layers:3"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_cross_products(architecture, parameters):
    model = tiny_model(architecture)
    rows = random_rows(seed=len(architecture), count=3, longest=24)
    assert_equals_the_cross_products(model, parameters, rows, random_rows(seed=50, count=2, longest=14))


@pytest.mark.parametrize("architecture", [*MORE_DENSE, "llama4_text"])
def test_more_architectures_equal_the_cross_products(architecture):
    dense = {"moe_layers": [0, 1], "no_rope_layers": [1, 1, 0, 1]} if architecture == "llama4_text" else {}
    model = tiny_model(architecture, **dense)  # Llama-4: a layer without positions and one of chunked attention
    validation = random_rows(seed=50, count=1, longest=12)
    assert_equals_the_cross_products(model, "last-layers:2", random_rows(seed=7, count=2, longest=16), validation)


def assert_equals_the_cross_products(model, parameters, rows, validation):
    oracle = double(model)
    scoring = prepare_model(model)
    linears = scored_linears(model, parameters)
    estimator = ValuePropagation(scoring, parameters, paper_direction(scoring, parameters, validation), window=5)
    values = estimator(make_batch(*rows))
    direct, causal = cross_products(
        oracle,
        rows,
        validation,
        [x.name for x in linears],
        {x.name: x.layer for x in linears},
        {x.name: value_rows(x, model) for x in linears},
        window=5,
    )
    assert relative_error(values.terms["adaptation_direct"], direct) < 1e-5
    assert relative_error(values.terms["adaptation_causal"], causal) < 1e-5
    assert relative_error(values.adaptation, direct + causal) < 1e-5
    assert float(causal.abs().max()) > 1e-3 * float(direct.abs().max())  # the causal path matters in this test


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_stability_is_the_same_form_along_the_drift(architecture):
    """delta_p^T D h_p + sum_k A[k, p] delta_k^T D_v h_p (Eqs. 11, 12), by loops in float64."""
    from oracles import captures, positions

    model = tiny_model(architecture)
    oracle = double(model)
    scoring = prepare_model(model)
    linears = scored_linears(model, "last-layers:2")
    generator = torch.Generator().manual_seed(3)
    drift = {x.name: torch.randn(x.module.weight.shape, generator=generator) for x in linears}
    rows = random_rows(seed=4, count=2, longest=20)
    values = ValuePropagation(scoring, "last-layers:2", drift, drift, window=4)(make_batch(*rows))
    expected = []
    for ids, mask in zip(*rows, strict=True):
        h, delta, attention = captures(oracle, ids, mask, [x.name for x in linears])
        for p in positions(mask):
            total = 0.0
            for x in linears:
                matrix = linear_matrix(model, x.name, drift[x.name]).double()
                total += delta[x.name][p] @ matrix @ h[x.name][p]
                index = value_rows(x, model)
                for k in range(p + 1, min(p + 4, len(ids) - 1) + 1) if index is not None else ():
                    share = attention[x.layer].mean(0)[k, p]
                    total += share * (delta[x.name][k][index] @ matrix[index] @ h[x.name][p])
            expected.append(total)
    assert relative_error(values.stability, torch.stack(expected)) < 1e-5
    torch.testing.assert_close(values.stability, values.adaptation)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_long_rows_cross_query_blocks(architecture, monkeypatch):
    """Blocks of queries give what one block gives."""
    import alphatoken.attention as attention

    scoring = prepare_model(tiny_model(architecture))
    ids, masks = random_rows(seed=8, count=3, longest=60)
    direction = paper_direction(scoring, "last-layers:2", (ids, masks))
    estimator = ValuePropagation(scoring, "last-layers:2", direction, window=9)
    whole = estimator(make_batch(ids, masks)).adaptation
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    assert relative_error(estimator(make_batch(ids, masks)).adaptation, whole) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_a_value_depends_on_its_row_alone(architecture):
    scoring = prepare_model(tiny_model(architecture))
    ids, masks = random_rows(seed=3, count=7)
    estimator = ValuePropagation(scoring, "last-layers:2", paper_direction(scoring, "last-layers:2", (ids, masks)))
    together = estimator(make_batch(ids, masks)).adaptation
    alone = torch.cat([estimator(make_batch([r], [m])).adaptation for r, m in zip(ids, masks, strict=True)])
    assert relative_error(together, alone) < 1e-5


def test_totals_agree_with_exact_values():
    """Row sums (exact) and column sums (delta^T M h at every position) share their total."""
    from alphatoken.capture import capture
    from alphatoken.contraction import bilinear
    from alphatoken.exact import Exact

    model = tiny_model("llama", dtype=torch.float64)
    scoring = prepare_model(model)
    linears = scored_linears(model, "all-linear")
    direction = {x.name: torch.randn(x.module.weight.shape, dtype=torch.float64) for x in linears}
    batch = make_batch(*random_rows(0, 3))
    captured = capture(scoring, batch, linears)
    columns = sum(
        bilinear(captured.deltas[x.name].flatten(0, 1), direction[x.name], captured.inputs[x.name].flatten(0, 1)).sum()
        for x in linears
    )
    rows = Exact(scoring, "all-linear", direction, method="forward")(batch).adaptation.sum()
    torch.testing.assert_close(columns, rows)


def test_window_zero_has_no_causal_part():
    scoring = prepare_model(tiny_model("llama"))
    rows = random_rows(1, 3)
    direction = paper_direction(scoring, "last-layers:1", rows)
    values = ValuePropagation(scoring, "last-layers:1", direction, window=0)(make_batch(*rows))
    assert not values.terms["adaptation_causal"].any()
    torch.testing.assert_close(values.adaptation, values.terms["adaptation_direct"])


@pytest.mark.parametrize("architecture", sorted(MORE_ARCHITECTURES.keys() - MORE_DENSE.keys()))
def test_what_is_no_linear_layer_is_an_error_that_names_it(architecture):
    named = {
        "qwen3_next": r"linear_attn\.conv1d\.weight.*Conv1d.*mlp\.experts\.down_proj.*Qwen3NextExperts",
        "llama4_text": r"feed_forward\.experts\.down_proj.*Llama4TextExperts",
        "bloom": r"query_key_value",
        "falcon": r"query_key_value",
    }
    message = named.get(architecture, r"mlp\.(router|gate)\.weight.*Router|mlp\.experts\.down_proj.*Experts")
    with pytest.raises(UserError, match=message):
        ValuePropagation(prepare_model(tiny_model(architecture)), "last-layers:2", {})


def test_unknown_fused_layout_is_an_error_that_names_it():
    model = tiny_model("gpt_neox")
    model.config.model_type = "something_new"
    with pytest.raises(UserError, match="query_key_value.*exact"):
        ValuePropagation(prepare_model(model), "last-layers:1", {})


def test_graph_starts_at_the_first_scored_layer():
    """No gradient and no graph below it, none for weights, and no output_attentions."""
    from alphatoken.capture import capture

    model = tiny_model("llama")
    scoring = prepare_model(model)
    seen = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: seen.update({i: out.requires_grad}))
    capture(scoring, make_batch(*random_rows(0, 2)), scored_linears(model, "last-layers:2"))
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
