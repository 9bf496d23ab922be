"""What README.md, docs/ and examples/ show, and what is done with each command where the tests run it.

Commands run as they stand: models and files of the names that the pages use are made beforehand (docs_session.py).
`PLACEHOLDERS` are names that the reader has to fill in. `SHORTER` are options that are added to save time. What cannot
run at all is in `CANNOT_RUN`, with the reason; of `alphatoken` commands among them at least the options are parsed.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SHELL_SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
SHELL = {"sh", "bash", "console"}

FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
JOB = re.compile(r"jobs/(\w+)\.py")
DOCSTRING_COMMAND = re.compile(r"^ {4}((?:alphatoken|python examples/).+?)(?:  +# .*)?$", re.MULTILINE)
README_BREAKS = ("## Training", "## Preference pairs")
CONFIG_FILE = re.compile(r"# (\S+\.yaml)\n")

PLACEHOLDERS = {
    "s3://BUCKET": "bucket",  # a folder here
    "RESPONSES": "runs/example-verifier/responses",
    "PAIRS": "runs/example-verifier/pairs-again",
    "FOLDER": "M",
}

# Added at the end of a command, where they win over what it says.
SHORTER = {
    "score": ["--num-actors", "1", "--gpus-per-actor", "0"],
    "fisher": ["--engine", "transformers", "--num-prompts", "4", "--max-new-tokens", "8"],
    "generate": ["--engine", "transformers", "--max-new-tokens", "12"],  # vLLM takes 40 s to start
    "train": ["--max-steps", "2"],
    "rounds": ["--max-steps", "2", "--plain-steps", "1", "--refresh-every", "1"],
    "--generate": ["--max-new-tokens", "12"],  # of rounds
    "evaluate": ["--limit", "2"],
}

CANNOT_RUN = {
    r"^\./start ": "makes an environment and installs into it; CI is `./start test` itself",
    r"^source \.venv/": "the environment that `./start setup` makes",
    r"^pip install\b": "changes the environment",
    r"^ray (up|down|dashboard)\b": "starts machines of a cloud, or needs them",
    r"^ray get-auth-token\b": "makes a secret in the home folder",
    r"^(docker|kubectl)\b": "there is neither Docker nor Kubernetes here",
    r"^ray job submit\b.* \.\.\.": "leaves names out; the cluster guide has them",
}


def reason_not_to_run(line: str) -> str | None:
    return next((reason for pattern, reason in CANNOT_RUN.items() if re.search(pattern, line)), None)


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of a page, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def sessions() -> dict[str, list[tuple[str, str]]]:
    """The blocks of every page, which its reader goes through in one folder. Of the README several, for time."""
    found = {str(page.relative_to(ROOT)): fences(page) for page in PAGES}
    name, rest = "README.md", (ROOT / "README.md").read_text(encoding="utf-8")
    for heading in README_BREAKS:
        part, found_heading, rest = rest.partition(f"\n{heading}\n")
        assert found_heading, f"README.md has no {heading}"
        found[name] = FENCE.findall(part)
        name = f"README.md {heading}"
    return found | {name: FENCE.findall(rest)}


def blocks(page: Path, languages: set[str]) -> list[str]:
    return [body for language, body in fences(page) if language in languages]


def config_files() -> dict[str, str]:
    """Files with settings that a page shows and a command reads, as name: text."""
    every = [body for page in PAGES for body in blocks(page, {"yaml"})]
    return {found[1]: body for body in every if (found := CONFIG_FILE.match(body))}


def lines(script: str) -> Iterator[str]:
    """The commands of a script, one a line: continuations joined, comments and empty lines left out."""
    for line in script.replace("\\\n", " ").splitlines():
        if shlex.split(line, comments=True):
            yield " ".join(line.split())


def docstring_commands(script: Path) -> list[str]:
    return DOCSTRING_COMMAND.findall(script.read_text(encoding="utf-8"))


def commands(script: str) -> Iterator[list[str]]:
    """The arguments of every `alphatoken ...`, and of every `python jobs/NAME.py ...`, in a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set(lexer.punctuation_chars):
                words.append(word)
                continue
            places = [i for i, each in enumerate(words) if JOB.fullmatch(each)]
            if words[:1] == ["alphatoken"]:
                yield words[1:]
            elif places:
                yield [JOB.fullmatch(words[places[0]])[1], *words[places[0] + 1 :]]
            words = []


def shown_commands() -> list[tuple[Path, list[str]]]:
    """(where it stands, arguments) of every command of ours."""
    scripts = {page: "\n".join(blocks(page, SHELL)) for page in PAGES}
    scripts |= {path: path.read_text(encoding="utf-8") for path in SHELL_SCRIPTS}
    scripts |= {path: "\n".join(docstring_commands(path)) for path in SCRIPTS}
    return [(path, argv) for path, script in scripts.items() for argv in commands(script)]
