"""Tangents of 8-bit floats: products against float64's of the same rounded factors, values against float64's own."""

import pytest
import torch
from oracles import double, exact_values
from test_exact import random_direction
from tiny_models import random_rows, tiny_model

from alphatoken.batching import make_batch
from alphatoken.config import ScoreConfig
from alphatoken.errors import UserError
from alphatoken.exact import Exact, choose_method
from alphatoken.float8 import Float8Product, check_float8, multiplied, scaled_rows
from alphatoken.model import prepare_model
from alphatoken.values import Targets

HALF_STEP = 2.0**-4  # three bits of mantissa


def draw(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-6, 6, (sizes[0], 1), generator=generator)  # rows of very different sizes
    return spread * torch.randn(sizes, generator=generator)


def whole(scaled) -> torch.Tensor:
    rows, scales = scaled
    return rows.double() * scales.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 16), (7, 48), (33, 272)])
def test_rows_are_rounded_over_their_own_scale(sizes, dtype):
    x = draw(*sizes).to(dtype)
    found, expected = whole(scaled_rows(x)), x.double()
    largest = expected.abs().amax(-1, keepdim=True)
    limit = HALF_STEP * expected.abs() + largest * 2.0**-18  # the smallest are without all bits
    assert ((found - expected).abs() <= limit).all()
    alone = torch.cat([whole(scaled_rows(row[None])) for row in x])
    assert torch.equal(alone, found)


def test_a_row_that_is_not_finite_is_alone():
    x = draw(3, 16)
    x[0], x[1, 3] = 0.0, float("nan")
    found = multiplied(x, scaled_rows(draw(16, 16, seed=1)))
    assert (found[0] == 0).all() and found[1].isnan().all() and found[2].isfinite().all()


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("d_out, d_in", [(16, 16), (48, 32), (64, 112)])
def test_the_product_is_that_of_the_rounded_factors(shape, d_out, d_in):
    count = torch.Size(shape).numel()
    x, x_tangent = (draw(count, d_in, seed=seed).view(*shape, d_in) for seed in (1, 2))
    weight, tangent = (draw(d_out, d_in, seed=seed) for seed in (3, 4))
    a, b = (whole(scaled_rows(y.view(count, d_in))) for y in (x_tangent, x))
    expected = a @ whole(scaled_rows(weight)).T + b @ whole(scaled_rows(tangent)).T
    size = a.abs() @ whole(scaled_rows(weight)).abs().T + b.abs() @ whole(scaled_rows(tangent)).abs().T
    found = Float8Product(weight, tangent)(x_tangent, x)
    assert found.shape == (*shape, d_out)
    assert ((found.view(count, d_out).double() - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "gpt_neox", "mixtral"])
def test_tokens_are_ranked_as_float64_does(architecture, parameters, dtype):
    model = tiny_model(architecture)
    direction, drift = (random_direction(model, parameters, seed) for seed in (1, 2))
    rows = random_rows(seed=1, count=6)
    oracle = double(model)
    scoring = prepare_model(model.to(getattr(torch, dtype)))
    estimator = Exact(scoring, parameters, direction, drift, tangent_dtype="float8")
    found = estimator(make_batch(*rows))
    for values, along in ((found.adaptation, direction), (found.stability, drift)):
        both = torch.stack([values.double(), exact_values(oracle, rows, along)])
        assert float(torch.corrcoef(both)[0, 1]) > 0.98
    assert estimator.tangents["adaptation"][0] and all("forward" not in m.__dict__ for m in model.modules())


def test_several_targets_take_a_pass_each():
    model = tiny_model("llama")
    scoring, batch = prepare_model(model), make_batch(*random_rows(seed=3, count=4))
    one, two = (random_direction(model, "all-linear", seed) for seed in (1, 2))
    both = Exact(scoring, "all-linear", Targets({"one": one, "two": two}), tangent_dtype="float8")
    assert both.shared is None
    alone = Exact(scoring, "all-linear", two, tangent_dtype="float8")(batch).adaptation
    torch.testing.assert_close(both(batch).terms["adaptation.two"], alone)


def test_it_is_forward_mode():
    assert choose_method("auto", torch.float32, "float8") == "forward"
    with pytest.raises(UserError, match="--tangent-dtype float8 is of forward mode; leave --method central out"):
        choose_method("central", torch.float32, "float8")


@pytest.mark.parametrize(
    "given, said",
    [
        ({"method": "central"}, "is of forward mode; leave --method central out"),
        ({"estimator": "value_propagation"}, "is for --estimator exact"),
    ],
)
def test_what_has_no_tangents_refuses_it(given, said):
    with pytest.raises(ValueError, match=f"--tangent-dtype {said}"):
        ScoreConfig(model="m", data=["d"], validation=["v"], output="o", tangent_dtype="float8", **given)


def test_layers_that_do_not_fit_refuse_it():
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match="none of the scored weights of GPT2LMHeadModel is of a torch linear layer"):
        Exact(prepare_model(model), "all-linear", random_direction(model, "all-linear"), tangent_dtype="float8")


@pytest.mark.parametrize("capability, able", [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_without_8_bit_floats_is_refused(capability, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    if able:
        return check_float8(torch.device("cuda"))
    with pytest.raises(UserError, match=r"A100 has 8\.0; leave it out"):
        check_float8(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_multiplies_as_a_cpu_does(dtype):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products of 8-bit floats")
    rows = enumerate([256, 256, 77, 77])
    weight, tangent, x, x_tangent = (draw(count, 512, seed=seed).to(dtype) for seed, count in rows)
    expected = Float8Product(weight, tangent)(x_tangent, x).float()
    found = Float8Product(weight.cuda(), tangent.cuda())(x_tangent.cuda(), x.cuda()).cpu().float()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
