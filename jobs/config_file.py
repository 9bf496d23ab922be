"""Settings of a YAML or JSON file, for a stage's pydantic class: what `--config FILE` gives."""

import json
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from alphatoken.errors import UserError, did_you_mean


def read(path: str, config_class: type[BaseModel]) -> dict[str, Any]:
    """Settings of a YAML (or JSON) file under the class's field names; UserError where it cannot be used."""
    import yaml

    try:
        content = _parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: is not valid YAML ({' '.join(str(error).split())})") from error
    content = {} if content is None else content
    if isinstance(content, dict) and "stage" in content and isinstance(content.get("config"), dict):
        content = content["config"]  # a run's manifest.json or run.json
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: has to be a mapping of names to values, such as `output: runs/masked`")
    settings = {}
    for given, value in content.items():
        name = str(given).replace("-", "_")
        if name not in config_class.model_fields:
            raise UserError(f"--config {path}: unknown name {given}{did_you_mean(name, config_class.model_fields)}")
        settings[name] = _as_text(value, config_class.model_fields[name])
    return settings


def _parsed(text: str) -> Any:
    """JSON as JSON: of its escapes YAML makes two halves of each character outside the basic plane."""
    import yaml

    try:
        return json.loads(text)
    except ValueError:
        return yaml.load(text, Loader=_yaml_loader())


def _yaml_loader() -> Any:
    """YAML's safe one, but 1:4 is text: YAML 1.1 reads it in base 60, as 64."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    text = ("tag:yaml.org,2002:str", re.compile(r"^[-+]?[0-9_]+(:[0-9_.]+)+$"))
    Loader.yaml_implicit_resolvers = {first: [text, *kinds] for first, kinds in Loader.yaml_implicit_resolvers.items()}
    return Loader


def _as_text(value: Any, field: FieldInfo) -> Any:
    """YAML reads `num_actors: 2` as a number; the command line gives text, and the field wants text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and set(members(field.annotation)) == {str} else value


def members(annotation: Any) -> list[Any]:
    """The types of a union, flat and without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [] if annotation is type(None) else [annotation]
