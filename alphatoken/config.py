"""What a run can be told: one typed class per stage, the same from Python, YAML and the command line.

Field descriptions are the command line's help texts. Unknown names and values outside their range are errors.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from alphatoken.credentials import refuse_secrets
from alphatoken.errors import option_name, option_names
from alphatoken.targets import files_by_target

EMBEDDED_MODEL = "smollm2-135m-instruct"
PARAMETERS_PATTERN = re.compile(r"(last-layers:[1-9][0-9]*|all-linear|all|lora|pattern:.+)", re.DOTALL)
PARAMETERS = (
    "last-layers:K, all-linear, all, lora (the factors of an adapter folder) or pattern:REGEX (of weights' names)"
)

Dtype = Literal["float32", "bfloat16"]
EstimatorName = Literal["exact", "value_propagation", "loss", "entropy", "excess_loss", "random"]
Scope = Literal["sequence", "dataset"]
Normalization = Literal["token", "sequence"]
Objective = Literal["sft", "dpo"]


def check_parameters(value: str | None) -> str | None:
    """A validator: ValueError unless `value` is a set of parameters that we know."""
    if value is None:
        return value
    if not PARAMETERS_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not {PARAMETERS}")
    if value.startswith("pattern:"):
        try:
            re.compile(value.removeprefix("pattern:"))
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value


def check_decoder_weights(value: str | None, who: str) -> None:
    """ValueError where other weights than those of decoder layers are to be scored. `who`: what cannot do that."""
    if value in ("all", "lora"):
        raise ValueError(
            f"{who} linear weights of the decoder layers, not {value}: use --parameters last-layers:K, all-linear or "
            "pattern:REGEX"
        )


Parameters = Annotated[str, Field(description=f"what is scored: {PARAMETERS}")]


def check_targets(validation: list[str]) -> list[str]:
    """A validator: ValueError unless all files have a target's name, or none."""
    files_by_target(validation)
    return validation


Validation = Annotated[list[str], AfterValidator(check_targets)]


class Settings(BaseModel):
    """What all settings share: none of them may hold a secret."""

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        refuse_secrets(values)
        return values


class StageConfig(Settings):
    """Shared by every stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field(description="folder or file to write, a local path or a URI")
    overwrite: bool = Field(False, description="replace what a different earlier run left in the output folder")

    def not_default(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that have another value than their default, sorted."""
        fields = type(self).model_fields
        return [
            name
            for name in sorted(names)
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]


class DataOptions(Settings):
    """How input rows become tokens."""

    columns: dict[str, str] = Field(
        {}, description="rename input columns, as wanted=given: prompt=question completion=answer"
    )
    max_length: int = Field(2048, ge=2, description="longest row in tokens")
    too_long: Literal["truncate", "quarantine"] = Field(
        "truncate", description="what happens to longer rows; truncated ones are counted"
    )
    special_tokens_in_text: Literal["literal", "control", "quarantine"] = Field(
        "control",
        description="special tokens that are written in the text of a row, such as <|im_end|>: control tokens, as in "
        "training stacks; literal (plain) text; or quarantine of the row. Such rows are counted",
    )


class ModelOptions(BaseModel):
    """How the model is loaded and run."""

    model: str = Field(description=f"folder or hub name of a causal LM, or {EMBEDDED_MODEL} (embedded)")
    dtype: Dtype | Literal["auto"] = Field("auto", description="auto: bfloat16 on a GPU, float32 on a CPU")
    batch_tokens: int = Field(4096, ge=16, description="computed positions per batch, padding included")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")


class TrunkOptions(BaseModel):
    """What becomes of the layers below the first scored one."""

    trunk_dtype: Literal["int8", "nf4"] | None = Field(
        None,
        description="weights of the layers that are not scored take a byte (int8) or half of one (nf4); values change "
        "little or, with nf4, somewhat (torchao)",
    )


def check_positions(positions: str | None, parameters: str | None) -> None:
    """Raises ValueError for weights that are not used at positions."""
    if positions == "response" and parameters == "all":
        raise ValueError("--positions response is defined for linear weights; use last-layers:K or all-linear")


class DirectionShape(BaseModel):
    """How validation rows become a direction."""

    normalization: Normalization = Field(
        "token", description="token: mean over response tokens (the paper); sequence: mean of unit gradients per row"
    )
    positions: Literal["all", "response"] | None = Field(
        None,
        description="positions whose use of the weights counts: all (the gradient) or response (the paper's mean over "
        "validation tokens); default all, for value_propagation response",
    )
    class_weights: dict[str, float] = Field(
        {}, description="weight of a token class in the validation loss, as class=weight: end-of-turn=0"
    )
    validation_objective: Objective = Field(
        "sft", description="sft: loss of validation responses; dpo: DPO loss of held-out preference pairs"
    )
    beta: float = Field(0.1, gt=0, description="dpo: strength of the tie to the reference, as in training")
    preconditioner: Literal["none", "adam"] = Field(
        "none", description="adam: divide by the root of the second moments of training gradients"
    )

    def positions_for(self, estimator: str) -> str:
        """The positions asked for, else the estimator's own."""
        return self.positions or ("response" if estimator == "value_propagation" else "all")


class DirectionOptions(DirectionShape):
    """The same, for a checkpoint without an optimizer."""

    preconditioner_data: list[str] = Field(
        [], description="training files for the second moments; score uses its own --data"
    )
    preconditioner_batches: int = Field(16, ge=1, description="training batches behind the second moments")
    preconditioner_rows: int = Field(8, ge=1, description="rows per such batch")

    @model_validator(mode="after")
    def _moments_are_wanted(self):
        if self.preconditioner_data and self.preconditioner == "none":
            raise ValueError("--preconditioner-data is for --preconditioner adam")
        return self


class DirectionConfig(StageConfig, DataOptions, ModelOptions, TrunkOptions, DirectionOptions):
    """The validation direction G."""

    validation: Validation = Field(
        min_length=1, description="validation files of the target task; of several: name=file for every file"
    )
    reference_model: str | None = Field(None, description="dpo: the reference; default: --model itself")
    parameters: Parameters = "all-linear"

    _parameters = field_validator("parameters")(check_parameters)

    @model_validator(mode="after")
    def _positions_fit(self):
        check_positions(self.positions, self.parameters)
        return self


MAKE_A_DIRECTION = set(DirectionOptions.model_fields) - {"validation_objective", "beta"}  # those are about pairs, too
# What baselines make no use of.
ABOUT_WEIGHTS = MAKE_A_DIRECTION | {"validation", "direction", "method", "tangent_dtype", "parameters", "trunk_dtype"}
ABOUT_WEIGHTS |= {"fisher", "window", "terms"}
STABILITY_NEEDS = "stability needs both --fisher and --reference-model; without them leave both out"


class ScoreConfig(StageConfig, DataOptions, ModelOptions, TrunkOptions, DirectionOptions):
    """Adaptation and stability of every response token."""

    data: list[str] = Field(min_length=1, description="files to score: JSONL (.gz), Parquet, a datasets name or folder")
    objective: Literal["auto", "sft", "dpo"] = Field(
        "auto", description="sft: rows with responses; dpo: preference pairs; auto: by the columns of the first row"
    )
    validation: Validation = Field(
        [],
        description="validation files of the target task; or give --direction. Of several tasks: name=file for every "
        "file; each gets a column adaptation.NAME, and adaptation is their sum",
    )
    direction: str | None = Field(None, description="file that `alphatoken direction` wrote")
    reference_model: str | None = Field(
        None, description="model before training: for stability, excess_loss and pairs (there default: --model itself)"
    )
    fisher: str | None = Field(None, description="file that `alphatoken fisher` wrote")
    estimator: EstimatorName = "exact"
    method: Literal["auto", "forward", "central"] = Field(
        "auto", description="exact: forward-mode AD or central difference; auto chooses by dtype and cost"
    )
    tangent_dtype: Literal["float8"] | None = Field(
        None,
        description="exact: tangents of linear layers by 8-bit products, twice as fast on GPUs that have them (Ada, "
        "Hopper or later) for values that differ somewhat; implies --method forward",
    )
    parameters: str | None = Field(
        None,
        description=f"what is scored: {PARAMETERS}; default: the direction's or the Fisher's, else all-linear "
        "(value_propagation: last-layers:3)",
    )
    window: int = Field(32, ge=0, description="value_propagation: causal window in tokens")
    terms: bool = Field(False, description="value_propagation: also write the paper's four terms")
    keep_columns: list[str] = Field([], description="input columns to carry into the output")
    num_actors: str = Field("1", pattern=r"^[1-9][0-9]*(:[1-9][0-9]*)?$", description="N, or MIN:MAX to autoscale")
    gpus_per_actor: float = Field(
        0, ge=0, description="GPUs of each actor; 0 scores on CPUs; several hold the layers below the scored ones"
    )
    cpus_per_actor: float = Field(1, gt=0, description="logical CPUs that each actor reserves")
    shard_tokens: int | None = Field(None, ge=1, description="about this many tokens per output shard; default by size")
    seed: int = Field(0, description="estimator random")

    _parameters = field_validator("parameters")(check_parameters)

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreConfig":
        if self.estimator in ("exact", "value_propagation"):
            if bool(self.validation) == bool(self.direction):
                raise ValueError("give either --validation FILES or --direction FILE")
            if self.direction and (given := self.not_default(MAKE_A_DIRECTION)):
                names = option_names(given)
                raise ValueError(f"{names}: how a direction is made; --direction {self.direction} is made already")
            if self.fisher and not self.reference_model:
                raise ValueError(STABILITY_NEEDS)
            if self.reference_model and not self.fisher and self.objective == "sft":
                raise ValueError(STABILITY_NEEDS)
        elif given := self.not_default(ABOUT_WEIGHTS):
            names = option_names(given)
            raise ValueError(f"{names}: for exact and value_propagation; {self.estimator} is about no weights")
        elif self.gpus_per_actor > 1:
            raise ValueError(f"--gpus-per-actor above 1 is for exact and value_propagation, not for {self.estimator}")
        if self.estimator != "exact" and (given := self.not_default({"method", "tangent_dtype"})):
            raise ValueError(f"{option_name(given[0])} is for --estimator exact")
        if self.tangent_dtype and self.method == "central":
            raise ValueError("--tangent-dtype is of forward mode; leave --method central out")
        check_positions(self.positions, self.parameters)
        if self.estimator == "excess_loss" and not self.reference_model:
            raise ValueError("estimator excess_loss needs --reference-model")
        if self.terms and self.estimator != "value_propagation":
            raise ValueError("--terms needs --estimator value_propagation: only it has the paper's four terms")
        if self.estimator == "value_propagation":
            check_decoder_weights(self.parameters, "value_propagation is defined on")
        if self.parameters == "lora" and self.fisher:
            raise ValueError(
                "--parameters lora has no stability: the reference model has no such factors; leave --fisher"
            )
        low, _, high = self.num_actors.partition(":")
        if high and int(high) < int(low):
            raise ValueError(f"--num-actors {self.num_actors}: the maximum is below the minimum")
        return self

    @property
    def actor_range(self) -> tuple[int, int]:
        """(minimum, maximum) number of scoring actors."""
        low, _, high = self.num_actors.partition(":")
        return int(low), int(high or low)


class ExportConfig(StageConfig):
    """A masked data set in the columns that another training stack reads."""

    input: str = Field(description="folder that `alphatoken mask` wrote")
    to: str = Field(description="training stack: trl, hf-trainer, axolotl, llama-factory, verl, open-instruct ...")


class DemoConfig(BaseModel):
    """The main job on the embedded model and data: score, mask, then a short training in rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field("runs/demo", description="folder for what the demo writes")
    rows: int = Field(32, ge=1, description="rows of the embedded data set to score and to train on")
    steps: int = Field(12, ge=0, description="optimizer steps of the training, of two rows each; 0 trains nothing")
    preference: bool = Field(
        False, description="instead: sample responses, pair them, value and mask the pairs, and train by DPO"
    )
    overwrite: bool = Field(False, description="start again instead of resuming")


def embedded_rows(name: str, count: int, target: Path) -> str:
    """The first rows of an embedded file, written as a file of their own; its path."""
    lines = (embedded_data() / name).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    return str(target)


def embedded_data() -> Path:
    """Folder of the data set that ships with the package."""
    return Path(__file__).parent / "demo_data"
