"""`alphatoken COMMAND`: each command is one job of this folder, imported only when it is called."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

if __name__ == "__main__":  # `python jobs/main.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.errors import did_you_mean

COMMANDS = {
    "fisher": ("jobs.fisher", "diagonal Fisher of the reference model: what stability is measured with"),
    "direction": ("jobs.direction", "validation direction: where training should go"),
    "generate": ("jobs.generate", "fresh responses to prompts, sampled from the model to be trained"),
    "pair": ("jobs.pair", "preference pairs from sampled responses, by a judge"),
    "plan": ("jobs.plan", "what a score run will cost: rows, memory, hours, price"),
    "score": ("jobs.score", "adaptation and stability of every response token"),
    "mask": ("jobs.mask", "choose which scored tokens are trained on"),
    "train": ("jobs.train", "SFT or DPO on the tokens that were kept, or in-run on any data"),
    "rounds": ("jobs.rounds", "training that values its own data again every few steps"),
    "evaluate": ("jobs.evaluate", "loss, multiple choice and exact answers of models, before and after"),
    "export": ("jobs.export", "masked data for another training stack: axolotl, llama-factory, verl ..."),
    "report": ("jobs.report", "values and masks as one HTML page, with sliders that mask again"),
    "show": ("jobs.show", "look at values and masks, token by token"),
    "completion": ("jobs.completion", "the script that makes bash, zsh or fish complete all this"),
    "demo": ("jobs.demo", "score and mask the embedded data with the embedded model"),
}
WRONG_USE = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if name == "--version":
        sys.stdout.write(f"alphatoken {_version()}\n")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        sys.stderr.write(f"alphatoken: unknown command {name}{hint}\n")
        return WRONG_USE
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(arguments[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: alphatoken COMMAND [OPTIONS]",
            "",
            "Which tokens of training data are worth training on.",
            "",
            *lines,
            "",
            "alphatoken COMMAND --help shows a command's options; --version shows the version.",
            "",
        ]
    )


def _version() -> str:
    try:
        return metadata.version("alphatoken")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
