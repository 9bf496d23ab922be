"""What `alphatoken plan` can be told: the run to be planned, the device it would run on and what that costs."""

import shlex
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from alphatoken.config import DataOptions, EstimatorName, ModelOptions, ScoreConfig, check_parameters
from alphatoken.errors import option_name

DeviceName = Literal["h100", "h200", "b200", "a100", "a100-40gb", "l40s", "l4", "a10", "cpu"]
DEVICE_NAMES: tuple[str, ...] = get_args(DeviceName)

GPU_UTILIZATION, CPU_UTILIZATION = 0.35, 0.7
NO_VALIDATION = "VALIDATION_FILES"  # in the recommended command where none were given

# Fields that mean the same in a score run and are handed on to it.
SHARED = (
    *DataOptions.model_fields, *ModelOptions.model_fields, "data", "objective", "validation", "direction",
    "reference_model", "fisher", "estimator", "method", "tangent_dtype", "parameters", "window", "shard_tokens",
    "output",
)  # fmt: skip


class PlanConfig(DataOptions, ModelOptions):
    """What a score run will cost: rows, memory per actor, device-hours, price, and the options to run it with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: list[str] = Field(min_length=1, description="files to score, as in `alphatoken score`")
    objective: Literal["auto", "sft", "dpo"] = Field(
        "auto", description="sft: rows with responses; dpo: preference pairs; auto: by the columns of the first row"
    )
    validation: list[str] = Field([], description="validation files; their direction is then part of the cost")
    direction: str | None = Field(None, description="file that `alphatoken direction` wrote")
    reference_model: str | None = Field(None, description="as in `alphatoken score`; its passes and memory count")
    fisher: str | None = Field(None, description="file for stability, a second direction; need not be there yet")
    estimator: EstimatorName = "exact"
    method: Literal["auto", "forward", "central"] = Field("auto", description="exact: as in `alphatoken score`")
    tangent_dtype: Literal["float8"] | None = Field(
        None, description="exact: as in `alphatoken score`; a product of 8-bit floats counts half"
    )
    parameters: str | None = Field(
        None,
        description="what is scored; default: the direction's or the Fisher's, else all-linear (value_propagation: "
        "last-layers:3)",
    )
    window: int = Field(32, ge=0, description="value_propagation: causal window in tokens")
    shard_tokens: int | None = Field(None, ge=1, description="about this many tokens per output shard")
    output: str = Field("runs/scored", description="folder that the recommended command writes; nothing is written now")

    device: DeviceName = Field(
        "h100", description="one per actor; GPUs by their data sheets (SXM), cpu: this machine, measured by a matmul"
    )
    utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the device's peak that scoring reaches, counting matrix products only; the defaults, "
        f"{GPU_UTILIZATION} of a GPU's data sheet and {CPU_UTILIZATION} of the matmul on cpu, are assumptions and not "
        "measurements: small models and short rows reach less",
    )
    price: float | None = Field(None, ge=0, description="of one device-hour, in any currency")
    num_actors: int | None = Field(None, ge=1, description="actors, one device each; default 1, or from --hours")
    hours: float | None = Field(None, gt=0, description="wanted wall-clock: how many actors does it take")
    sample_rows: int = Field(
        20_000, ge=1, description="encode at most this many rows, drawn evenly from all files, and scale up"
    )

    _parameters = field_validator("parameters")(check_parameters)

    @model_validator(mode="after")
    def _consistent(self) -> "PlanConfig":
        if self.num_actors and self.hours:
            raise ValueError("give either --num-actors or --hours: one follows from the other")
        try:
            self.score_config()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    @property
    def device_utilization(self) -> float:
        """The one asked for, else the device's default."""
        return self.utilization or (CPU_UTILIZATION if self.device == "cpu" else GPU_UTILIZATION)

    def score_config(self, **changes: Any) -> ScoreConfig:
        """The score run that is planned. Raises pydantic's ValidationError where there is no such run."""
        settings = {name: getattr(self, name) for name in SHARED}
        if self.estimator in ("exact", "value_propagation") and not (self.validation or self.direction):
            settings["validation"] = [NO_VALIDATION]
        return ScoreConfig(**(settings | changes))


def command_line(config: ScoreConfig) -> str:
    """`alphatoken score` with every setting that is not its default, and those that a plan is about."""
    shown = {"batch_tokens", "num_actors", *config.not_default(ScoreConfig.model_fields)}
    words = ["alphatoken", "score"]
    for name, _ in sorted(ScoreConfig.model_fields.items(), key=lambda item: not item[1].is_required()):
        if name not in shown:
            continue
        value, option = getattr(config, name), option_name(name)
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
            continue
        items = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
        items = items if isinstance(items, list) else [f"{items:g}" if isinstance(items, float) else str(items)]
        words += [option, *items]
    return shlex.join(words)
