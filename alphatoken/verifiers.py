"""Verifiers: whether a response says what the data set's answer says.

`number` (the final number, as in GSM8K), `exact` (the text, blanks aside), `math` (math-verify), or the user's own
function as `module:function`, called with (response, answer): True or False, or a score.
"""

import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from alphatoken.errors import BadRowError, UserError, first_line
from alphatoken.evaluation_rows import VERIFIERS

Verify = Callable[[str, str], float]


def load_verifier(name: str, folder: str) -> Verify:
    """folder: where modules are looked for, after the installed ones. Raises UserError where it is not found."""
    if name in VERIFIERS:
        return _agreeing(VERIFIERS[name])
    return _math_verify() if name == "math" else _own(name, folder)


def verifier_source(name: str, folder: str) -> str | None:
    """The text of the module that `name` gives, to know a run by; None for the verifiers that come with us.

    Raises UserError as `load_verifier` does.
    """
    load_verifier(name, folder)
    path = getattr(sys.modules.get(name.partition(":")[0]), "__file__", None)
    return Path(path).read_bytes().decode(errors="replace") if ":" in name and path else None


def score_response(verify: Verify, response: str, answer: str) -> float:
    """Raises BadRowError where the verifier raises, or returns what is no score."""
    try:
        score = verify(response, answer)
    except Exception as error:  # the user's own code may raise anything
        raise BadRowError(f"the verifier raised {type(error).__name__}: {first_line(error)}") from error
    try:
        number = float(score)
    except (TypeError, ValueError) as error:
        raise BadRowError(f"the verifier returned a {type(score).__name__}, not a truth value or number") from error
    if not math.isfinite(number):
        raise BadRowError(f"the verifier returned {number}, which is no score")
    return number


def _agreeing(extract: Callable[[str], object]) -> Verify:
    def verify(response: str, answer: str) -> float:
        wanted = extract(answer)
        if wanted is None:
            raise ValueError("the answer has nothing to compare with")
        return float(extract(response) == wanted)

    return verify


def _math_verify() -> Verify:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("--verifier math needs math-verify, which is not installed: pip install 'math-verify[antlr4]'")
    from math_verify import parse, verify

    # Its time limits use signals, which only a main thread may set; Ray's workers run elsewhere.
    return lambda response, answer: float(
        verify(parse(answer, parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None)
    )


def _own(name: str, folder: str) -> Verify:
    module, _, function = name.partition(":")
    if folder not in sys.path:  # the `alphatoken` command does not have the working folder there
        sys.path.append(folder)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--verifier {name}: {first_line(error)}") from error
    except Exception as error:  # the user's own code may raise anything
        what = f"{type(error).__name__} in {_where(error)}: {getattr(error, 'msg', None) or first_line(error)}"
        raise UserError(f"--verifier {name} cannot be loaded: {what}") from error
    try:
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UserError(f"--verifier {name}: {module} has no {function}") from error
    if not callable(found):
        raise UserError(f"--verifier {name} is not a function")
    return found


def _where(error: Exception) -> str:
    """File and line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}"
