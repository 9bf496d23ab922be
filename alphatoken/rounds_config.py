"""What a training run in rounds can be told: a training run, and how its windows are valued."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from alphatoken.config import Dtype, check_decoder_weights
from alphatoken.errors import option_name
from alphatoken.generate_config import Stops, check_verifier
from alphatoken.targets import one_target
from alphatoken.train_config import BY_VALUE, TrainConfig

OF_GENERATE = ("verifier", "temperature", "stop", "max_new_tokens")


class RoundsConfig(TrainConfig):
    """Train in rounds: value the next steps' data with the current weights, mask it, train on it, go on."""

    data: list[str] = Field(
        min_length=1, description="training files, in any format that score reads; dpo: preference pairs, or prompts"
    )
    estimator: Literal["value_propagation", "exact"] = Field("exact", description="how tokens are valued")
    preconditioner: Literal["none", "adam"] = Field(
        "adam", description="adam: what AdamW would do with the direction, from the optimizer's own second moments"
    )
    plain_steps: int = Field(12, ge=0, description="optimizer steps on every token before the first window")
    refresh_every: int = Field(
        12, ge=1, description="optimizer steps of a window; more than the run has: one offline pass"
    )
    scope: Literal["sequence", "window"] = Field(
        "window", description="one threshold per response, or one for all tokens of a window"
    )
    drop_sequences: float = Field(
        0.0, ge=0, lt=1, description="first drop this share of rows, the lowest by mean value"
    )
    generate: int = Field(
        0, ge=0, description="dpo: --data has prompts; this many responses of the current weights are paired"
    )
    verifier: str = Field(
        "number", description="generate: what says whether a response is right: number, exact, math or module:function"
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="generate: of the samples")
    stop: Stops = Field([], description="generate: texts that end a response, besides the model's own end of turn")
    max_new_tokens: int = Field(256, ge=1, description="generate: longest response in tokens")
    overlap: bool = Field(
        False, description="value the next window while this one is trained on: with weights one window older"
    )
    max_staleness: int | None = Field(
        None, ge=0, description="never train on values older than this many steps; a run that would is refused"
    )
    num_actors: int = Field(1, ge=1, description="scoring actors")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs of each scoring actor; 0 scores on CPUs")
    cpus_per_actor: float = Field(1, gt=0, description="logical CPUs that each scoring actor reserves")
    score_dtype: Dtype | Literal["auto"] = Field("auto", description="auto: bfloat16 on a GPU, float32 on a CPU")
    batch_tokens: int = Field(4096, ge=16, description="computed positions per scoring batch, padding included")

    _verifier_name = field_validator("verifier")(check_verifier)

    @model_validator(mode="before")
    @classmethod
    def _choose_rule(cls, values: Any) -> Any:
        """sft: suspect, which helped on noisy sets and did no harm on a clean one (docs/results/README.md); dpo: none.
        Unless what is given speaks of shares.
        """
        if not isinstance(values, dict) or values.get("preset"):
            return values
        if {"keep_fraction", "scope"} & values.keys():
            return {"rule": "share"} | values
        return {"rule": "none" if values.get("objective") == "dpo" else "suspect"} | values

    @property
    def stage(self) -> str:
        return "rounds"

    @property
    def trains_on_files(self) -> bool:
        return True

    @property
    def data_kind(self) -> str:
        return "prompts" if self.generate else super().data_kind

    @property
    def oldest_values(self) -> int:
        """Age in steps of the oldest values that a step of this run is trained on."""
        return (2 if self.overlap else 1) * self.refresh_every - 1

    def _check_live_values(self) -> None:
        if self.in_run:
            raise ValueError("--in-run is an option of `alphatoken train`; rounds value whole windows")
        if not self.validation:
            raise ValueError("rounds need --validation FILES of the target task")
        self._check_validation_objective()
        if self.generate and self.objective == "sft":
            raise ValueError("--generate makes preference pairs: it needs --objective dpo")
        if not self.generate and (given := self.not_default(OF_GENERATE)):
            raise ValueError(f"{option_name(given[0])} needs --generate: without it no response is sampled")
        if self.generate == 1:
            raise ValueError("--generate 1: a pair needs two responses or more")
        if self.objective == "dpo" and self.lora_rank and not self.reference_model:
            raise ValueError("rounds of dpo with --lora-rank need --reference-model, which the actors load")
        if self.drop_sequences and self.rule not in BY_VALUE:
            raise ValueError(
                f"--drop-sequences goes by mean value, and --rule {self.rule} values nothing: give --rule share, with "
                "--keep-fraction 1 where rows are all that goes"
            )
        self._check_settings_of_share("keep_fraction", "scope")
        check_decoder_weights(self.parameters, "rounds score")
        one_target(self.validation, "rounds know")

    @model_validator(mode="after")
    def _rounds_are_consistent(self) -> "RoundsConfig":
        if self.lora_rank and self.uses_moments:
            raise ValueError(
                "--preconditioner adam reads the optimizer's moments of whole weights; with --lora-rank give "
                "--preconditioner none"
            )
        if self.uses_moments and not self.plain_steps:
            raise ValueError("--preconditioner adam needs --plain-steps 1 or more: without a step there are no moments")
        self._check_moments()
        if self.max_staleness is not None and self.max_staleness < self.oldest_values:
            raise ValueError(
                f"--max-staleness {self.max_staleness}: values get up to {self.oldest_values} steps old with "
                f"--refresh-every {self.refresh_every}{' and --overlap' if self.overlap else ''}; refresh more often"
            )
        if self.early_stopping and (self.eval_steps % self.refresh_every or self.plain_steps % self.refresh_every):
            raise ValueError(
                "--early-stopping in rounds needs --eval-steps and --plain-steps that are multiples of --refresh-every"
            )
        return self
