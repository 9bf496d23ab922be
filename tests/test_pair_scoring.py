"""Values, log-probabilities and sums of preference pairs against float64 definitions."""

import numpy as np
import pytest
import torch
from oracles import double, relative_error, token_losses
from pair_rows import branch_row, dpo_coefficients, dpo_gradient, encoded_pairs, propagated_values, random_pairs
from tiny_models import tiny_model

from alphatoken import schema
from alphatoken.architecture import scored_linears, scored_parameters, value_rows
from alphatoken.baselines import Baseline
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.model import prepare_model
from alphatoken.pair_direction import PairWeights, pair_batch
from alphatoken.pair_encode import EncodedPair
from alphatoken.pair_scoring import PairEstimator, score_pair_table
from alphatoken.schema import BRANCHES
from alphatoken.scoring import NOT_FINITE
from alphatoken.value_propagation import ValuePropagation
from alphatoken.values import TokenValues

CPU = torch.device("cpu")
BETA = 0.3


@pytest.fixture(scope="module")
def models():
    """(policy, reference), each with a float64 copy, taken before attention is ours."""
    found = [tiny_model("llama"), tiny_model("llama", seed=1)]
    doubles = [double(model) for model in found]
    return [prepare_model(model) for model in found], doubles


def random_direction(model, parameters: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in scored_parameters(model, parameters).items()}


def score(estimator, policy, reference, pairs, beta=BETA, batch_tokens=64):
    table, failures, _ = score_pair_table(
        encoded_pairs(pairs), PairEstimator(estimator, policy, reference), batch_tokens, CPU, beta
    )
    assert table.schema.equals(schema.SCORED_PAIRS)
    return table.to_pylist(), failures


@pytest.mark.parametrize(("method", "tolerance"), [("forward", 1e-5), ("central", 1e-2)])
@pytest.mark.parametrize("parameters", ["last-layers:2", "all"])
def test_exact_values_are_derivatives_of_the_dpo_loss(models, method, tolerance, parameters):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(3, 5)
    tangents = {
        name: random_direction(policy.model, parameters, i) for i, name in enumerate(("adaptation", "stability"))
    }
    estimator = Exact(policy, parameters, *tangents.values(), method)
    found, failures = score(estimator, policy, reference, pairs)
    assert not failures
    for name, tangent in tangents.items():
        ours, expected = [], []
        for pair, row in zip(pairs, found, strict=True):
            coefficients = dpo_coefficients(policy64, reference64, pair, BETA)
            for branch in BRANCHES:
                losses = token_losses(policy64, *branch_row(pair, branch))
                for t, loss in enumerate(losses):
                    grads = torch.autograd.grad(loss, [policy64.get_parameter(n) for n in tangent], retain_graph=True)
                    along = sum((g * m.double()).sum() for g, m in zip(grads, tangent.values(), strict=True))
                    expected.append(coefficients[branch][t] * along)
                ours.append(torch.tensor(row[f"{branch}_{name}"]))
        assert relative_error(torch.cat(ours), torch.stack(expected)) < tolerance


def test_values_of_a_pair_add_up_to_the_derivative_of_its_loss(models):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(4, 3)
    tangent = random_direction(policy.model, "all-linear", 5)
    found, _ = score(Exact(policy, "all-linear", tangent, method="forward"), policy, reference, pairs)
    for pair, row in zip(pairs, found, strict=True):
        grads = dpo_gradient(policy64, reference64, [pair], BETA, list(tangent))
        expected = float(sum((grads[n] * tangent[n].double()).sum() for n in tangent))
        assert sum(row["chosen_adaptation"] + row["rejected_adaptation"]) == pytest.approx(expected, rel=1e-3)


def test_value_propagation_with_delta_of_the_dpo_loss(models):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(6, 4)
    linears = scored_linears(policy.model, "last-layers:2")
    tangent = random_direction(policy.model, "last-layers:2", 2)
    estimator = ValuePropagation(policy, "last-layers:2", tangent, tangent, window=4)
    found, _ = score(estimator, policy, reference, pairs)
    rows = {x.name: value_rows(x, policy.model) for x in linears}
    for pair, row in zip(pairs, found, strict=True):
        expected = propagated_values(policy64, reference64, pair, BETA, tangent, linears, rows, 4)
        for branch in BRANCHES:
            for name in ("adaptation", "stability"):
                assert relative_error(torch.tensor(row[f"{branch}_{name}"]), expected[branch]) < 1e-5


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("own_reference", [False, True])
def test_stored_log_probabilities_are_those_of_a_plain_forward_pass(models, method, own_reference):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(7, 6)
    tangent = random_direction(policy.model, "all-linear", 3)
    found, _ = score(
        Exact(policy, "all-linear", tangent, method=method), policy, reference if own_reference else None, pairs
    )
    for pair, row in zip(pairs, found, strict=True):
        sums = {}
        for branch in BRANCHES:
            ours = -token_losses(policy64, *branch_row(pair, branch)).detach().numpy()
            theirs = -token_losses(reference64, *branch_row(pair, branch)).detach().numpy() if own_reference else ours
            np.testing.assert_allclose(row[f"{branch}_logprobs"], ours, rtol=0, atol=1e-4)
            np.testing.assert_allclose(row[f"{branch}_ref_logprobs"], theirs, rtol=0, atol=1e-4)
            assert row[f"ref_{branch}_logps"] == pytest.approx(theirs.sum(), abs=1e-4)
            sums[branch] = ours.sum() - theirs.sum()
        omega = BETA / (1 + np.exp(BETA * (sums["chosen"] - sums["rejected"])))
        assert row["omega"] == pytest.approx(omega, rel=1e-4)
        if not own_reference:
            assert row["omega"] == np.float32(BETA / 2)
        lengths = [len(pair[f"{branch}_ids"]) for branch in BRANCHES]
        assert row["num_response_tokens"] == sum(lengths)
        values = row["chosen_adaptation"] + row["rejected_adaptation"]
        assert row["mean_adaptation"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
        logprobs = row["chosen_logprobs"] + row["rejected_logprobs"]
        assert row["mean_loss"] == pytest.approx(-np.mean(logprobs), rel=1e-4)


def test_a_pair_does_not_depend_on_its_batch(models):
    (policy, reference), _ = models
    pairs = random_pairs(8, 7)
    estimator = Exact(policy, "all-linear", random_direction(policy.model, "all-linear", 1), method="forward")
    together, _ = score(estimator, policy, reference, pairs, batch_tokens=10**6)
    for pair, row in zip(pairs, together, strict=True):
        alone = score(estimator, policy, reference, [pair])[0][0]
        np.testing.assert_allclose(row["rejected_adaptation"], alone["rejected_adaptation"], rtol=1e-3, atol=1e-4)


def test_controls_keep_their_signal(models):
    """`loss` ranks tokens by their loss on either side; `random` differs between the sides of a pair."""
    (policy, reference), _ = models
    pairs = random_pairs(9, 3)
    for row in score(Baseline(policy, "loss"), policy, reference, pairs)[0]:
        for branch in BRANCHES:
            np.testing.assert_allclose(row[f"{branch}_adaptation"], -np.array(row[f"{branch}_logprobs"]), rtol=1e-5)
    same = [pairs[0] | {"rejected_ids": pairs[0]["chosen_ids"]}]
    row = score(Baseline(policy, "random", seed=1), policy, None, same)[0][0]
    assert row["chosen_adaptation"] != row["rejected_adaptation"]


@pytest.mark.parametrize("bad", [20, 21])
def test_a_branch_that_is_not_finite_fails_its_pair_alone(models, bad):
    (policy, _), _ = models

    def estimator(batch):
        values = torch.ones(batch.num_response_tokens)
        rows = batch.row_ids.repeat_interleave(batch.response_mask[:, 1:].sum(1))
        values[rows == bad] = torch.nan
        return TokenValues(values, torch.zeros_like(values), -torch.ones_like(values))

    _, failures = score(estimator, policy, None, random_pairs(1, 4))
    assert failures == {0: NOT_FINITE}  # row id 10: branches 20 and 21


@pytest.mark.filterwarnings("error")
def test_a_value_that_only_overflows_when_it_is_weighted_fails_its_pair(models):
    """omega is near beta / 2 here, so values near the end of float32 leave it."""
    (policy, _), _ = models

    def estimator(batch):
        values = torch.ones(batch.num_response_tokens)
        rows = batch.row_ids.repeat_interleave(batch.response_mask[:, 1:].sum(1))
        values[rows == 23] = 3e38
        return TokenValues(values, torch.zeros_like(values), -torch.ones_like(values))

    found, failures = score(estimator, policy, None, random_pairs(1, 4), beta=8.0)
    assert failures == {1: NOT_FINITE}
    assert all(np.isfinite(row["rejected_adaptation"]).all() for i, row in enumerate(found) if i != 1)


class Failing:
    """Raises for chosen branches, and above a number of positions."""

    def __init__(self, policy, error, bad=(), most=10**9):
        self.error, self.bad, self.most, self.loss = error, set(bad), most, Baseline(policy, "loss")

    def __call__(self, batch):
        if batch.input_ids.numel() > self.most or self.bad & set(batch.row_ids.tolist()):
            raise self.error
        return self.loss(batch)


@pytest.mark.parametrize("bad", [[22], [23], [22, 23]])  # row id 11: branches 22 and 23
def test_a_branch_that_cannot_be_computed_fails_its_pair_alone(models, bad):
    (policy, reference), _ = models
    pairs = random_pairs(1, 4)
    found, failures = score(Failing(policy, KeyError("x"), bad), policy, reference, pairs, batch_tokens=10**6)
    assert failures == {1: "the computation of this row failed (KeyError: 'x')"}
    expected, _ = score(Baseline(policy, "loss"), policy, reference, pairs, batch_tokens=10**6)
    for i in (0, 2, 3):
        np.testing.assert_allclose(found[i]["chosen_logprobs"], expected[i]["chosen_logprobs"], rtol=1e-4)
        assert found[i]["omega"] == pytest.approx(expected[i]["omega"], rel=1e-4)


def test_pairs_that_do_not_fit_together(models):
    (policy, reference), _ = models
    pairs = random_pairs(1, 6)
    error = torch.OutOfMemoryError("CUDA out of memory")
    lengths = [len(pair["prompt_ids"]) + max(len(pair[f"{b}_ids"]) for b in BRANCHES) for pair in pairs]
    most = sorted(lengths)[-2]
    found, failures = score(Failing(policy, error, most=most), policy, reference, pairs, batch_tokens=10**6)
    assert set(failures) == {i for i, length in enumerate(lengths) if length > most}
    assert all("out of memory with this row alone" in reason for reason in failures.values())
    assert len(found) == 6 and all(np.isfinite(row["omega"]) for row in found)


def test_one_bad_pair_alone_in_its_block_is_no_wrong_set_up(models):
    (policy, reference), _ = models
    (pair,) = random_pairs(1, 1)
    assert set(score(Failing(policy, KeyError("x"), most=2), policy, reference, [pair])[1]) == {0}
    with pytest.raises(KeyError):
        score(Failing(policy, KeyError("x"), most=2), policy, reference, random_pairs(1, 2))


def test_no_pairs_at_all(models):
    (policy, _), _ = models
    assert score(Baseline(policy, "loss"), policy, None, [])[0] == []


@pytest.mark.parametrize("parameters", ["last-layers:2", "all"])
@pytest.mark.parametrize("own_reference", [False, True])
def test_direction_is_the_gradient_of_the_dpo_loss(models, parameters, own_reference):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(11, 4)
    encoded = [EncodedPair(p["prompt_ids"], p["chosen_ids"], p["rejected_ids"], False) for p in pairs]
    weigh = PairWeights(policy, reference if own_reference else None, BETA)
    batches = [pair_batch(encoded[:3]), pair_batch(encoded[3:])]
    found = mean_gradient(policy, batches, GradientOptions(parameters=parameters), weigh)
    assert found.num_rows == 4
    expected = dpo_gradient(policy64, reference64 if own_reference else policy64, pairs, BETA, list(found.tensors))
    if not own_reference:  # the reference is held still
        frozen = double(policy64)
        expected = dpo_gradient(policy64, frozen, pairs, BETA, list(found.tensors))
    for name, tensor in found.tensors.items():
        assert relative_error(tensor, expected[name]) < 1e-4


def test_direction_by_pair_norm(models):
    (policy, reference), (policy64, reference64) = models
    pairs = random_pairs(12, 3)
    encoded = [EncodedPair(p["prompt_ids"], p["chosen_ids"], p["rejected_ids"], False) for p in pairs]
    options = GradientOptions(parameters="last-layers:1", normalization="sequence")
    found = mean_gradient(policy, (pair_batch([e]) for e in encoded), options, PairWeights(policy, reference, BETA))
    grads = [dpo_gradient(policy64, reference64, [pair], BETA, list(found.tensors)) for pair in pairs]
    norms = [torch.sqrt(sum(g.square().sum() for g in grad.values())) for grad in grads]
    for name, tensor in found.tensors.items():
        expected = sum(grad[name] / norm for grad, norm in zip(grads, norms, strict=True)) / 3
        assert relative_error(tensor, expected) < 1e-4
