"""Best against worst: which pairs come out, and why none."""

import pytest

from alphatoken.pairing import Candidate, best_against_worst, distinct


def candidates(*finished: bool) -> list[Candidate]:
    return [Candidate(i, f"text {i}", [i], done) for i, done in enumerate(finished)]


def found(scores, *finished, **options):
    pairs = best_against_worst(candidates(*(finished or [True] * len(scores))), scores, **options)
    return pairs if isinstance(pairs, str) else [(p.chosen.sample, p.rejected.sample) for p in pairs]


def test_the_best_meets_the_worst():
    assert found([0.1, 0.9, 0.5]) == [(1, 0)]
    assert found([0.1, 0.9, 0.5, 0.2], max_pairs=2) == [(1, 0), (2, 3)]
    assert found([0.1, 0.9, 0.5], max_pairs=3) == [(1, 0)]  # the middle one has nobody left


def test_ties_go_by_sample_number_whatever_the_order():
    assert found([1.0, 0.0, 1.0, 0.0]) == [(0, 1)]
    turned = best_against_worst(candidates(True, True, True, True)[::-1], [0.0, 1.0, 0.0, 1.0])
    assert [(p.chosen.sample, p.rejected.sample) for p in turned] == [(0, 1)]


def test_a_response_that_was_cut_may_lose_but_not_win():
    assert found([1.0, 0.5, 0.0], False, True, True) == [(1, 2)]
    assert found([1.0, 0.0], True, False) == [(0, 1)]
    assert "cut off" in found([1.0, 0.0], False, True)
    assert "cut off" in found([1.0, 0.0], False, False)


@pytest.mark.parametrize(
    ("scores", "options", "reason"),
    [
        ([1.0], {}, "fewer than two"),
        ([], {}, "fewer than two"),
        ([0.3, 0.3], {}, "the same score"),
        ([0.3, 0.4], {"margin": 0.5}, "less than the margin 0.5"),
    ],
)
def test_no_pair_has_a_reason(scores, options, reason):
    assert reason in found(scores, **options)


def test_margin_holds_for_every_pair():
    assert found([0.0, 1.0, 0.4, 0.6], margin=0.5, max_pairs=2) == [(1, 0)]


def test_identical_and_empty_texts_count_once():
    texts = ["yes", " yes\n", "no", "", "  "]
    assert [c.sample for c in distinct([Candidate(i, text, None) for i, text in enumerate(texts)])] == [0, 2]


def test_of_equal_texts_one_that_was_not_cut_off_is_kept():
    texts = [("yes", False), ("no", True), ("yes", True), ("yes ", True)]
    found = distinct([Candidate(i, text, None, done) for i, (text, done) in enumerate(texts)])
    assert [(c.sample, c.finished) for c in found] == [(2, True), (1, True)]
