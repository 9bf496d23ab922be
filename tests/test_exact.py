"""The exact estimator against one backward pass per token in float64."""

import copy

import pytest
import torch
from oracles import double, exact_values, gated_delta_rule, relative_error, token_losses
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, random_rows, tiny_model
from transformers.models.qwen3_next import modeling_qwen3_next

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.config import EMBEDDED_MODEL
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact, choose_method
from alphatoken.model import load_model, prepare_model
from alphatoken.tangent_linear import wide_products
from alphatoken.values import Targets

FORWARD, CENTRAL = 1e-5, 1e-2


def random_direction(model, parameters: str, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in scored_parameters(model, parameters).items()}


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_backward_per_token(architecture, method, parameters):
    model = tiny_model(architecture)
    oracle = double(model)
    scoring = prepare_model(model)
    rows = random_rows(seed=len(architecture), count=5)
    adaptation, drift = (random_direction(model, parameters, seed) for seed in (1, 2))
    values = Exact(scoring, parameters, adaptation, drift, method)(make_batch(*rows))
    tolerance = FORWARD if method == "forward" else CENTRAL
    assert relative_error(values.adaptation, exact_values(oracle, rows, adaptation)) < tolerance
    assert relative_error(values.stability, exact_values(oracle, rows, drift)) < tolerance
    expected = torch.cat([token_losses(oracle, *row).detach() for row in zip(*rows, strict=True)])
    torch.testing.assert_close(-values.logprobs.double(), expected, rtol=0, atol=1e-5 if method == "forward" else 1e-3)


@pytest.mark.parametrize("method", ["forward", "central", "targets"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_the_padding_token_moves_as_it_does_in_training(architecture, method):
    """Autograd gives it no gradient as input, but one as a target of a tied head: it may be the end of a turn."""
    model = tiny_model(architecture)
    oracle = double(model)
    ids, masks = random_rows(seed=7, count=4)
    rows = [[0 if i % 3 == 1 else token for i, token in enumerate(row)] for row in ids], masks
    direction = random_direction(model, "all")
    assert model.get_input_embeddings().padding_idx == 0
    along = Targets({"one": direction, "two": random_direction(model, "all", 2)}) if method == "targets" else direction
    how = "forward" if method == "targets" else method
    found = Exact(prepare_model(model), "all", along, method=how)(make_batch(*rows))
    values = found.terms["adaptation.one"] if method == "targets" else found.adaptation
    assert relative_error(values, exact_values(oracle, rows, direction)) < (CENTRAL if how == "central" else FORWARD)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_stability_has_no_part_of_a_head_without_drift(method):
    model = tiny_model("llama")
    oracle, rows = double(model), random_rows(seed=5, count=3)
    drift = random_direction(model, "all-linear", 2)
    values = Exact(prepare_model(model), "all", random_direction(model, "all"), drift, method)(make_batch(*rows))
    tolerance = FORWARD if method == "forward" else CENTRAL
    assert relative_error(values.stability, exact_values(oracle, rows, drift)) < tolerance


def exact_of(model, parameters, direction, rows, method):
    return Exact(prepare_model(model), parameters, direction, method=method)(make_batch(*rows))


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
@pytest.mark.parametrize("architecture", [name for name in MORE_ARCHITECTURES if name != "qwen3_next"])
def test_more_architectures_equal_one_backward_per_token(architecture, parameters):
    model = tiny_model(architecture)
    oracle = double(model)
    rows = random_rows(seed=len(architecture), count=2, longest=20)
    direction = random_direction(model, parameters)
    expected = exact_values(oracle, rows, direction)
    losses = torch.cat([token_losses(oracle, *row).detach() for row in zip(*rows, strict=True)])
    for method, tolerance in (("forward", FORWARD), ("central", CENTRAL)):
        if (architecture, method) == ("bloom", "forward"):
            with pytest.raises(UserError, match=r"h\.\d\.mlp\.gelu_impl \(BloomGelu\) has no forward-mode"):
                exact_of(model, parameters, direction, rows, method)
            continue
        values = exact_of(model, parameters, direction, rows, method)
        assert relative_error(values.adaptation, expected) < tolerance
        atol = 1e-5 if method == "forward" else 1e-3
        torch.testing.assert_close(-values.logprobs.double(), losses, rtol=0, atol=atol)


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear", "all"])
def test_linear_attention_equals_one_backward_per_token(parameters, monkeypatch):
    """Its own kernel works in float32, whose rounding its short keys amplify: 1e-5 to 2e-4, by the random weights."""
    model = tiny_model("qwen3_next")
    oracle = double(model)
    rows = random_rows(seed=10, count=2, longest=14)
    direction = random_direction(model, parameters)
    forward = exact_of(model, parameters, direction, rows, "forward").adaptation
    central = exact_of(model, parameters, direction, rows, "central").adaptation
    monkeypatch.setattr(modeling_qwen3_next, "torch_chunk_gated_delta_rule", gated_delta_rule)
    expected = exact_values(oracle, rows, direction)
    assert relative_error(forward, expected) < 1e-3
    assert relative_error(central, expected) < 2 * CENTRAL
    in_float64 = {name: tensor.double() for name, tensor in direction.items()}
    model.double().set_experts_implementation("eager")  # grouped kernels know no float64
    found = exact_of(model, parameters, in_float64, rows, "forward").adaptation
    assert relative_error(found, expected) < FORWARD


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_step_moves_no_token_to_another_expert(architecture, monkeypatch):
    """Where two experts are nearly tied, losses jump: their difference over a small step is no derivative."""
    model = tiny_model(architecture)
    for layer in model.model.layers:
        router = layer.mlp.gate if architecture == "mixtral" else layer.mlp.router
        with torch.no_grad():
            router.weight[1:] = router.weight[0] + 1e-4 * torch.randn_like(router.weight[1:])
            if architecture == "gpt_oss":
                router.bias[:] = 0.0
    direction, rows = random_direction(model, "all-linear"), random_rows(seed=3, count=4)
    expected = exact_of(model, "all-linear", direction, rows, "forward").adaptation  # in float64 other experts win
    assert relative_error(exact_of(model, "all-linear", direction, rows, "central").adaptation, expected) < CENTRAL
    monkeypatch.setattr("alphatoken.exact.is_routed", lambda model: False)
    assert relative_error(exact_of(model, "all-linear", direction, rows, "central").adaptation, expected) > 0.1


def test_expert_kernels_are_restored():
    model = tiny_model("mixtral")
    before = model.get_experts_implementation()
    assert before[""] != "eager"
    estimator = Exact(prepare_model(model), "all-linear", random_direction(model, "all-linear"), method="forward")
    estimator(make_batch(*random_rows(0, 2)))
    with pytest.raises(IndexError):
        estimator(make_batch([[1, 2, 10**6]], [[False, True, True]]))
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("parameters", ["last-layers:1", "all-linear"])
@pytest.mark.parametrize("method", ["forward", "central"])
def test_a_value_depends_on_its_row_alone(architecture, parameters, method):
    scoring = prepare_model(tiny_model(architecture))
    estimator = Exact(scoring, parameters, random_direction(scoring.model, parameters), method=method)
    ids, masks = random_rows(seed=3, count=7)
    together = make_batch(ids, masks)
    alone = torch.cat([estimator(make_batch([row], [mask])).adaptation for row, mask in zip(ids, masks, strict=True)])
    tolerance = 1e-5 if method == "forward" else CENTRAL
    assert relative_error(estimator(together).adaptation, alone) < tolerance
    backwards = estimator(make_batch(ids[::-1], masks[::-1]))
    restored = torch.cat(together_parts(ids[::-1], masks[::-1], backwards.adaptation)[::-1])
    assert relative_error(restored, alone) < tolerance


def together_parts(ids, masks, values):
    return make_batch(ids, masks).split(values)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_model_is_left_as_it_was(method):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    estimator = Exact(prepare_model(model), "last-layers:2", random_direction(model, "last-layers:2"), method=method)
    estimator(make_batch(*random_rows(0, 2)))
    with pytest.raises(IndexError):
        estimator(make_batch([[1, 2, 10**6]], [[False, True, True]]))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_zero_drift_gives_zero_stability():
    scoring = prepare_model(tiny_model("llama"))
    direction = random_direction(scoring.model, "all-linear")
    zero = {name: torch.zeros_like(tensor) for name, tensor in direction.items()}
    for method in ("forward", "central"):
        values = Exact(scoring, "all-linear", direction, zero, method)(make_batch(*random_rows(0, 2)))
        assert not values.stability.any()


def test_method_is_chosen_by_dtype_and_cost():
    assert choose_method("auto", torch.float32) == "central"
    assert choose_method("auto", torch.float64) == choose_method("auto", torch.bfloat16) == "forward"
    with pytest.raises(UserError, match="float32"):
        choose_method("central", torch.bfloat16)


@pytest.mark.parametrize("able", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_a_cpu_that_multiplies_bfloat16_does_so(able, monkeypatch):
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda check=check: check == able)
    cpu = torch.device("cpu")
    assert wide_products(cpu, torch.bfloat16) == (able is None)
    assert not wide_products(cpu, torch.float32) and not wide_products(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "phi3", "gpt_neox"])
def test_bfloat16_ranks_tokens_as_float64_does(architecture, wide, monkeypatch):
    """bfloat16 keeps three digits per product: values are noisy, their order is not."""
    monkeypatch.setattr("alphatoken.exact.wide_products", lambda *_: wide)
    model = tiny_model(architecture)
    direction = random_direction(model, "all-linear")
    rows = random_rows(seed=1, count=6)
    expected = exact_values(double(model), rows, direction)
    scoring = prepare_model(model.to(torch.bfloat16))
    found = Exact(scoring, "all-linear", direction)(make_batch(*rows)).adaptation
    assert found.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([found.double(), expected]))[0, 1]
    assert float(correlation) > 0.995


@pytest.mark.parametrize("parameters", ["all", "all-linear", "last-layers:2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stacked_products_are_the_same_tangents(architecture, parameters, monkeypatch):
    """In float32, where nothing is rounded away: products of [W M] against forward-mode AD's own."""
    model = tiny_model(architecture)
    direction, batch = random_direction(model, parameters), make_batch(*random_rows(seed=5, count=4))
    found = []
    for wide in (True, False):
        monkeypatch.setattr("alphatoken.exact.wide_products", lambda *_, wide=wide: wide)
        estimator = Exact(prepare_model(model), parameters, direction, method="forward")
        found.append(estimator(batch).adaptation)
    assert relative_error(found[0], found[1].double()) < 1e-5
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["all-linear", "last-layers:3"])
def test_central_is_forward_mode_on_a_real_model_along_its_own_gradient(parameters):
    """A trained model bends far more along its gradient than a random one: the step has to find its size."""
    scoring = load_model(EMBEDDED_MODEL, "float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (2, 2, 40), generator=generator).tolist()
    masks = [[i >= 10 for i in range(40)]] * 2
    direction = mean_gradient(scoring, [make_batch(ids[0], masks)], GradientOptions(parameters)).tensors
    batch = make_batch(ids[1], masks)
    found = [Exact(scoring, parameters, direction, method=m)(batch).adaptation for m in ("forward", "central")]
    forward, central = found
    assert relative_error(central, forward.double()) < CENTRAL
