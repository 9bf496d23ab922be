"""Verifiers by name, the user's own, and what goes wrong with them."""

import pytest

from alphatoken.errors import BadRowError, UserError
from alphatoken.verifiers import load_verifier, score_response, verifier_source


def test_number_and_exact(tmp_path):
    number, exact = (load_verifier(name, str(tmp_path)) for name in ("number", "exact"))
    assert score_response(number, "It is 1,200 in all.", "#### 1200") == 1.0
    assert score_response(number, "no idea", "#### 1200") == 0.0
    assert score_response(exact, " a  b ", "a b") == 1.0
    assert score_response(exact, "ab", "a b") == 0.0


def test_an_own_function_and_what_it_may_return(tmp_path):
    (tmp_path / "own_checks.py").write_text(
        "def length(response, answer): return -abs(len(response) - len(answer))\n"
        "def broken(response, answer): raise KeyError('oh')\n"
        "def silent(response, answer): pass\n"
        "def endless(response, answer): return float('nan')\n"
        "limit = 3\n"
    )
    assert score_response(load_verifier("own_checks:length", str(tmp_path)), "abc", "abcde") == -2.0
    for name, reason in (("broken", "raised KeyError: 'oh'"), ("silent", "NoneType"), ("endless", "nan")):
        with pytest.raises(BadRowError, match=reason):
            score_response(load_verifier(f"own_checks:{name}", str(tmp_path)), "a", "b")
    for name, reason in (
        ("own_checks:gone", "has no gone"),
        ("own_checks:limit", "not a function"),
        ("no_such:f", "no_such"),
    ):
        with pytest.raises(UserError, match=reason):
            load_verifier(name, str(tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ndef check(:\n", r"SyntaxError in \S+checks_syntax\.py, line 2: invalid syntax$"),
        ("\nlimit = unknown\n", r"NameError in \S+checks_name\.py, line 2: name 'unknown' is not defined$"),
        ("from math import no_such\n", "no_such"),
    ],
)
def test_a_file_that_cannot_be_loaded(tmp_path, code, message):
    module = "checks_syntax" if "def" in code else "checks_name" if "limit" in code else "checks_import"
    (tmp_path / f"{module}.py").write_text(code)
    with pytest.raises(UserError, match=message):
        load_verifier(f"{module}:check", str(tmp_path))


def test_an_answer_without_a_number(tmp_path):
    with pytest.raises(BadRowError, match="nothing to compare with"):
        score_response(load_verifier("number", str(tmp_path)), "3", "three")


def test_a_verifier_is_known_by_the_module_that_its_name_gives(tmp_path):
    """Whatever kind of callable it is."""
    text = (
        "import functools\n"
        "class Length:\n"
        "    def __call__(self, response, answer): return 1.0\n"
        "    def method(self, response, answer): return 1.0\n"
        "called = Length()\n"
        "bound = Length().method\n"
        "@functools.lru_cache\n"
        "def cached(response, answer): return 1.0\n"
    )
    (tmp_path / "kinds_of_checks.py").write_text(text)
    for name in ("called", "bound", "cached", "Length.method"):
        assert verifier_source(f"kinds_of_checks:{name}", str(tmp_path)) == text
    (tmp_path / "kinds_of_checks.py").write_text(text + "# changed\n")
    assert verifier_source("kinds_of_checks:called", str(tmp_path)) == text + "# changed\n"
    assert verifier_source("number", str(tmp_path)) is None
    with pytest.raises(UserError, match="has no gone"):
        verifier_source("kinds_of_checks:gone", str(tmp_path))
