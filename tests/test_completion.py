"""`alphatoken completion SHELL`: the script completes in a real bash, and is valid in other shells."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import completion, main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh", "fish"):
        found[shell] = folder / shell
        found[shell].write_text(completion._completion(completion.CompletionConfig(shell=shell))["script"])
    return found


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = f"""
    source {script}
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    function=$(complete -p alphatoken | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function alphatoken "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code, "bash", "alphatoken", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_paths(scripts):
    script = scripts["bash"]
    assert completed(script, "ma") == ["mask"] and set(completed(script, "")) >= set(main.COMMANDS)
    assert completed(script, "mask", "--sc") == ["--scope"]
    assert completed(script, "mask", "--scope", "") == ["sequence", "dataset"]
    assert completed(script, "mask", "--protect", "word", "--keep") == ["--keep-fraction"]
    assert completed(script, "score", "--terms", "--no-te") == ["--no-terms"]
    assert completed(script, "score", "--data", "pyproj") == ["pyproject.toml"]
    assert completed(script, "show", "test") == ["tests"]
    assert completed(script, "completion", "") == ["bash", "zsh", "fish"]
    assert completed(script, "rounds", "--dry") == ["--dry-run"] and completed(script, "mask", "--dry") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_the_script(scripts, shell):
    text = scripts[shell].read_text()
    assert "keep-fraction" in text and all(name in text for name in main.COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(scripts[shell])], check=True)


def test_unknown_shells_are_refused(capsys):
    assert main.main(["completion", "csh"]) == 2
    assert "--shell csh: input should be 'bash', 'zsh' or 'fish'" in capsys.readouterr().err


def test_completing_loads_nothing_heavy():
    code = (
        "import sys; from jobs.main import main; assert main(['completion', 'bash']) == 0; "
        "sys.exit(str({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "set()\n" and "complete -o" in done.stdout
