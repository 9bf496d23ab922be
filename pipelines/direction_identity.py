"""What makes a direction this one and no other: for its provenance, and to know its run again."""

from typing import Any

from alphatoken import tensor_file
from alphatoken.checkpoint_files import files_fingerprint, settings_fingerprint
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.sources import data_fingerprint
from alphatoken.targets import UNNAMED, files_by_target, validation_files

NO_TRAINING_ROWS = "--preconditioner adam needs --preconditioner-data FILES: training rows for its moments"


def direction_run(
    config: ScoreConfig | DirectionConfig, parameters: str, positions: str, model: Any, dtype: Any
) -> dict[str, Any]:
    """What makes this direction and no other: fields of Provenance. model: its fingerprint; dtype: its name."""
    options = direction_identity(config, positions) | {"dtype": dtype}
    options["model_settings"] = settings_fingerprint(config.model, config.trust_remote_code)
    if config.preconditioner != "none":
        options["preconditioner_fingerprint"] = data_fingerprint(preconditioner_files(config))
    return {
        "model_fingerprint": model,
        "parameters": parameters,
        "data_fingerprint": data_fingerprint(validation_files(config.validation)),
        "options": options,
    }


def direction_provenance(run: dict[str, Any], about: dict) -> tensor_file.Provenance:
    """about: what is known of each target, by its name. What all have in common, and of named ones each."""
    options: dict[str, Any] = {"num_refused": sum(part["num_refused"] for part in about.values())}
    if UNNAMED in about:
        health, step = about[UNNAMED]["health"], about[UNNAMED]["central_step"]
    else:
        told = [f"{name}: {sentence}" for name, part in about.items() for sentence in part["health"]["concerns"]]
        health, step = {"targets": {name: part["health"] for name, part in about.items()}, "concerns": told}, None
        options["targets"] = {name: {key: part[key] for key in part if key != "health"} for name, part in about.items()}
    return tensor_file.Provenance(
        kind="direction",
        num_rows=sum(part["num_rows"] for part in about.values()),
        num_tokens=sum(part["num_tokens"] for part in about.values()),
        health=health,
        central_step=step,
        **run | {"options": run["options"] | options},
    )


def preconditioner_files(config: ScoreConfig | DirectionConfig) -> list[str]:
    files = config.preconditioner_data or getattr(config, "data", [])
    if not files:
        raise UserError(NO_TRAINING_ROWS)
    return files


def direction_identity(config: ScoreConfig | DirectionConfig, positions: str) -> dict:
    """The settings that a direction depends on, as JSON."""
    names: tuple[str, ...] = ("normalization", "class_weights", "preconditioner", "columns", "max_length", "too_long")
    names += ("special_tokens_in_text",)
    settings = {name: getattr(config, name) for name in names} | {"positions": positions}
    if config.validation_objective == "dpo":
        settings |= {name: getattr(config, name) for name in ("validation_objective", "beta", "reference_model")}
        if config.reference_model:
            settings["reference_files"] = files_fingerprint(config.reference_model, config.trust_remote_code)
    if config.trunk_dtype:
        settings["trunk_dtype"] = config.trunk_dtype
    if config.preconditioner != "none":
        more = ("preconditioner_data", "preconditioner_batches", "preconditioner_rows")
        settings |= {name: getattr(config, name) for name in more}
    return settings


def validation_fingerprint(validation: list[str]) -> str | dict[str, str]:
    """Of the files; by target where targets have names."""
    found = {target: data_fingerprint(files) for target, files in files_by_target(validation).items()}
    return found.get(UNNAMED, found)
