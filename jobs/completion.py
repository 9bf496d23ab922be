"""Tab completion for a shell: `alphatoken completion bash > ~/.local/share/bash-completion/completions/alphatoken`."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # `python jobs/completion.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pydantic import BaseModel, ConfigDict, Field

from jobs import cli

FOLDER_FIRST = ("export", "report", "show")  # commands that take their folder without --input
# Options whose value is a path, or may be one; the others complete to their choices, if they have some.
PATHS = frozenset({
    "answers", "chat_template", "choices", "compare", "config", "data", "direction", "evaluation", "fisher", "input",
    "judge_model", "judge_template", "loss", "model", "output", "preconditioner_data", "prompts", "reference_model",
    "validation",
})  # fmt: skip


class CompletionConfig(BaseModel):
    """Print the script that makes a shell complete `alphatoken`, its commands and their options, with the Tab key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shell: Literal["bash", "zsh", "fish"] = Field(description="the shell that reads the script")


CONFIG = CompletionConfig


def main(argv: list[str] | None = None) -> int:
    arguments = cli.folder_first(argv, "--shell")
    return cli.run(CONFIG, _completion, arguments, show=_show, prog="alphatoken completion")


def _completion(config: CompletionConfig) -> dict:
    import shtab

    return {"shell": config.shell, "script": shtab.complete(whole_parser(), config.shell)}


def _show(config: CompletionConfig, result: dict) -> None:
    sys.stdout.write(result["script"].rstrip() + "\n")


def whole_parser() -> argparse.ArgumentParser:
    """Every command with its options, as argparse and shtab see them. Nothing is ever parsed by it."""
    import shtab

    from jobs.main import COMMANDS

    parser = argparse.ArgumentParser(prog="alphatoken")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command")
    for name, (module, says) in COMMANDS.items():
        command = commands.add_parser(name, help=says)
        config_class = importlib.import_module(module).CONFIG
        cli.add_options(command, config_class, f"alphatoken {name}")
        for action in command._actions:
            _complete(action, config_class)
        if name in FOLDER_FIRST:
            command.add_argument("folder", nargs="?", help="the folder").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        if config_class is CompletionConfig:
            shells = cli.choices(CONFIG.model_fields["shell"])
            command.add_argument("name", nargs="?", choices=shells, help="the shell")
    return parser


def _complete(action: Any, config_class: type[BaseModel]) -> None:
    """Choices where the option has some, else paths where it takes one."""
    import shtab

    field = config_class.model_fields.get(action.dest)
    if found := field and cli.choices(field):
        action.choices = found
    elif action.dest in PATHS:
        action.complete = shtab.FILE


if __name__ == "__main__":
    sys.exit(main())
