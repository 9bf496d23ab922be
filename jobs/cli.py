"""Arguments in, one configuration object out: the command line of a stage, made from its pydantic class.

Every field is an option in kebab-case. `--config FILE.yaml` gives the same names; the command line wins. A run can be
repeated from its own manifest.json in the same way. pydantic checks types and ranges; each problem is one sentence.
"""

import argparse
import json
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from alphatoken.errors import UserError, did_you_mean, option_name
from jobs import ending
from jobs.config_file import members, read

OK, FAILED, WRONG_USE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
HEAVY = ("direction", "fisher", "generate", "pair", "score", "train", "rounds")  # commands with --dry-run
OUTPUT_STATES = {
    "new": "new",
    "replace": "what is there would be replaced",
    "resume": "the same run was cut off and would go on, if the weights are the same",
    "finished": "the same run is finished; nothing would be done, if the weights are the same",
}

Main = Callable[[Any], dict | None]
Show = Callable[[Any, dict], None]

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **options)
        # argparse takes -1e-3 for an option unless told what a negative number looks like.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        given, unknown = self.parse_known_args(argv)
        if unknown:
            option = unknown[0].partition("=")[0]
            raise UserError(f"unknown option {option}{did_you_mean(option, self._option_string_actions)}")
        return vars(given)


def run(
    config_class: type[BaseModel],
    main: Main,
    argv: Sequence[str] | None = None,
    *,
    show: Show | None = None,
    prog: str | None = None,
) -> int:
    """Parse `argv` into a config_class, call `main(config)` and return the exit code.

    0: done. 2: wrong use, bad values or data (pydantic errors, UserError), each told in one sentence on stderr.
    1: anything else. 130: Ctrl-C. 143: SIGTERM. `main` returns JSON values: printed as one line with --json, else given
    to `show(config, result)`. The last line on stderr, `PROG: ...`, says why a run ended.
    """
    prog = prog or f"alphatoken {config_class.__name__.removesuffix('Config').lower()}"
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        parser = _Parser(prog=prog, description=(config_class.__doc__ or "").strip())
        add_options(parser, config_class, prog)
        options = parser.parse(argv)
        as_json = options.pop("json", False)
        options.pop("debug", None)
        dry = options.pop("dry_run", False)
        config = _build(config_class, options)
        main, show = (dry_run, show_dry_run) if dry else (main, show)
        started = time.time()
        with ending.by_signal():
            result = main(config)
        if as_json:
            sys.stdout.write(json.dumps(_finite(result), allow_nan=False) + "\n")
        elif show and result is not None:
            show(config, result)
        if hasattr(config, "output") and not dry:
            _report(prog, [ending.sentence(result, started)], OK, debug=False)
        sys.stdout.flush()
        return OK
    except BrokenPipeError:  # `| head` has seen enough; the interpreter would complain at its end, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SystemExit as stop:  # --help; and SIGTERM as Ray tells it
        if stop.code == signal.SIGTERM:
            return _report(prog, [ending.interrupted("SIGTERM")], TERMINATED, debug)
        return stop.code if isinstance(stop.code, int) else FAILED
    except KeyboardInterrupt:
        return _report(prog, [ending.interrupted("Ctrl-C")], INTERRUPTED, debug)
    except ValidationError as error:
        return _report(prog, [_sentence(problem) for problem in error.errors()], WRONG_USE, debug)
    except UserError as error:
        return _report(prog, [str(error)], WRONG_USE, debug)
    except Exception as error:
        text = f"{type(error).__name__}: {error} (--debug shows where)"
        return _report(prog, [text], FAILED, debug)


def dry_run(config: Any) -> dict:
    """Every check of the run that needs no weights, and what it would do. Writes nothing."""
    from pipelines.dry_run import dry_run as check  # imports Ray and torch: not before the arguments are right

    return check(config)


def show_dry_run(config: Any, found: dict) -> None:
    """What `dry_run` returns, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in found.items():
        text = f"{value:,}" if isinstance(value, int) else "; ".join(value) if isinstance(value, list) else str(value)
        if name != "dry_run" and value is not None:
            table.add_row(name.replace("_", " "), OUTPUT_STATES.get(text, text) if name == "state" else text)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    console.print("dry run: the checks passed, nothing was written")


def folder_first(argv: Sequence[str] | None, option: str = "--input") -> list[str]:
    """The arguments, where the first one may come without its option's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, option)
    return arguments


def show_tensor_file(config: Any, provenance: dict) -> None:
    """What direction and fisher say when they are done."""
    text = f"{provenance['kind']} of {provenance['parameters']} from {provenance['num_rows']} rows"
    sys.stdout.write(f"{text} ({provenance['num_tokens']} response tokens): {config.output}\n")


def _finite(value: Any) -> Any:
    """The same JSON value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(prog: str, sentences: list[str], code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    for sentence in sentences:
        sys.stderr.write(f"{prog}: {sentence}\n")
    return code


def add_options(parser: argparse.ArgumentParser, config_class: type[BaseModel], prog: str) -> None:
    """An option for each field, and those that every command has."""
    own = config_class.__annotations__  # what the stage is about first, what all stages share after it
    fields = sorted(config_class.model_fields.items(), key=lambda item: (not item[1].is_required(), item[0] not in own))
    for name, field in fields:
        parser.add_argument(option_name(name), dest=name, help=_help(field), **_argument(name, field))
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; the command line wins")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if prog.rpartition(" ")[2] in HEAVY:
        parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, stop")


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """argparse's view of one field. Values stay strings: pydantic converts and checks them."""
    kinds = {get_origin(kind) or kind for kind in members(field.annotation)}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if dict in kinds:
        return {"action": "extend", "nargs": "+", "metavar": "KEY=VALUE"}
    metavar = "N" if int in kinds else "X" if float in kinds else name.rsplit("_", 1)[-1].upper()
    if list in kinds:
        return {"action": "extend", "nargs": "+", "metavar": metavar}
    return {"metavar": metavar}


def choices(field: FieldInfo) -> list[str]:
    literals = [kind for kind in members(field.annotation) if get_origin(kind) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def _help(field: FieldInfo) -> str:
    notes = []
    if found := choices(field):
        notes.append("one of " + ", ".join(found))
    if field.is_required():
        notes.append("required")
    elif says := dependent_default(field):
        notes.append(f"default: {says}")
    elif field.default not in (None, PydanticUndefined, [], {}) and field.annotation is not bool:
        notes.append(f"default: {field.default}")
    text = (field.description or "") + (f" ({'; '.join(notes)})" if notes else "")
    return text.strip().replace("%", "%%")


def dependent_default(field: FieldInfo) -> str | None:
    """In words, where a default depends on other options."""
    extra = field.json_schema_extra
    return str(extra["default_note"]) if isinstance(extra, dict) and "default_note" in extra else None


def _build(config_class: type[BaseModel], options: dict[str, Any]) -> BaseModel:
    file = options.pop("config", None)
    values = read(file, config_class) if file else {}
    for name, value in options.items():
        kinds = {get_origin(kind) or kind for kind in members(config_class.model_fields[name].annotation)}
        values[name] = _pairs(name, value) if dict in kinds else value
    return config_class(**values)


def _pairs(name: str, items: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise UserError(f"{option_name(name)} {item}: give it as KEY=VALUE")
        if key in pairs:
            raise UserError(f"{option_name(name)} gives {key} twice, as {pairs[key]} and as {value}; give it once")
        pairs[key] = value
    return pairs


def _sentence(problem: Mapping[str, Any]) -> str:
    """One pydantic error, named by its option: `--keep-fraction 1.5: input should be less than or equal to 1`."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    option = option_name(str(problem["loc"][0]))
    if problem["type"] == "missing":
        return f"{option} is required"
    value = problem["input"]
    shown = f" {value}" if isinstance(value, str | int | float) else ""
    return f"{option}{shown}: {message[:1].lower()}{message[1:]}"
