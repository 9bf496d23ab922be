"""What an exported folder tells its reader to give the stack."""

import re
from pathlib import Path

import yaml


def snippet_of(folder: str) -> str:
    [found] = re.findall(r"```(?:python|yaml)\n(.*?)```", Path(folder, "README.md").read_text(), re.DOTALL)
    return found


def read_snippet(folder: str) -> dict:
    return yaml.safe_load(snippet_of(folder))
