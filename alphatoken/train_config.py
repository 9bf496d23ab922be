"""What a training run can be told. In the style of config.py: one typed class, the same from Python, YAML and the
command line.
"""

from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator
from pydantic.config import JsonDict

from alphatoken.config import DirectionShape, StageConfig, check_decoder_weights, check_parameters
from alphatoken.errors import option_name
from alphatoken.targets import one_target

PAPER = {
    "estimator": "value_propagation", "parameters": "last-layers:3", "rule": "share", "keep_fraction": 0.5,
    "stability_weight": 1.5,
}  # fmt: skip

# The rule of in-run SFT that helped on noisy sets and did no harm on a clean one (docs/results/README.md)
IN_RUN_SFT = {"rule": "suspect", "plain_steps": 12, "refresh_every": 12}

# Rules that need values of tokens, and rules that need the losses of validation rows
BY_VALUE, BY_LOSS = frozenset({"share", "suspect"}), frozenset({"suspect", "surprising"})


def depends(text: str) -> JsonDict:
    """What --help says of a default that depends on other options; the field's own is the last resort."""
    return {"default_note": text}


class LiveValueOptions(DirectionShape):
    """How tokens are valued and chosen while a model trains: in-run and in rounds."""

    validation: list[str] = Field([], description="validation files of the target task")
    estimator: Literal["value_propagation", "exact"] = Field("value_propagation", description="how tokens are valued")
    parameters: str | None = Field(
        None, description="what is scored: last-layers:K or all-linear; default last-layers:3 (exact: all-linear)"
    )
    window: int = Field(32, ge=0, description="value_propagation: causal window in tokens")
    preset: Literal["paper"] | None = Field(
        None, description="paper: value_propagation, last-layers:3, keep-fraction 0.5, stability-weight 1.5"
    )
    rule: Literal["none", "share", "suspect", "surprising"] = Field(
        "share",
        description="sft: what is trained on. share: the tokens of the highest values; suspect: all but tokens of a "
        "negative value that surprise the model, where more do than validation tokens of their class, and rows that "
        "surprise it as a whole; surprising: the same whatever the value, so nothing is valued; none: nothing is left "
        "out",
        json_schema_extra=depends("suspect; share where a share is asked for; dpo: share in-run, none in rounds"),
    )
    keep_fraction: float = Field(0.8, gt=0, le=1, description="rule share: part of the response tokens to train on")
    stability_weight: FiniteFloat = Field(1.5, ge=0, description="the paper's lambda; needs --fisher to matter")
    fisher: str | None = Field(
        None, description="file that `alphatoken fisher` wrote for the reference model: adds stability to the values"
    )
    plain_steps: int = Field(
        0, ge=0, description="optimizer steps on every token before the first mask",
        json_schema_extra=depends("12 with rule suspect, else 0"),
    )  # fmt: skip
    refresh_every: int = Field(
        10, ge=1, description="optimizer steps between refreshes of the validation direction",
        json_schema_extra=depends("12 with rule suspect, else 10"),
    )  # fmt: skip

    _parameters = field_validator("parameters")(check_parameters)

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """A preset fills what was not given; what was given wins."""
        return PAPER | values if isinstance(values, dict) and values.get("preset") == "paper" else values

    @property
    def scored_parameters(self) -> str:
        return self.parameters or ("all-linear" if self.estimator == "exact" else "last-layers:3")


class TrainConfig(StageConfig, LiveValueOptions):
    """Train on a token-masked data set, or with --in-run on any data set: SFT (Eq. 13) or DPO (Eq. 14)."""

    objective: Literal["sft", "dpo"] = "sft"
    data: list[str] = Field(
        min_length=1, description="folder that `alphatoken mask` wrote; with --in-run any files that score reads"
    )
    in_run: bool = Field(False, description="value every batch as it is trained on (the paper's Algorithm 1)")
    model: str = Field(description="folder or hub name of the causal LM to train, or smollm2-135m-instruct (embedded)")
    reference_model: str | None = Field(
        None,
        description="dpo: the reference, where the data has no log-probabilities of it; with --fisher: the model "
        "before training (default: --model)",
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")

    epochs: float = Field(1.0, gt=0, description="passes over the data; each sees every row once")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps, whatever the epochs")
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = Field(
        "linear", description="of the learning rate"
    )
    warmup: float = Field(0.0, ge=0, description="warm-up steps; below 1: a share of all steps")
    optimizer: str = Field("adamw_torch_fused", description="any name that transformers' TrainingArguments.optim knows")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="clip gradients to this norm; 0 does not clip")
    per_device_batch_size: int = Field(4, ge=1, description="rows (dpo: pairs) per worker and forward pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes per optimizer step")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto",
        description="bfloat16: mixed precision, weights stay float32; auto: bfloat16 on GPUs, float32 on CPUs",
    )
    max_length: int | None = Field(
        None, ge=2, description="cut longer rows at their end; default: as they are (files: 2048)"
    )
    seed: int = Field(0, description="order of the rows, dropout, LoRA's start")

    normalize: Literal["kept", "response"] = Field(
        "kept", description="sft: divide the loss of a step by its kept tokens (the paper) or by all response tokens"
    )
    weights: bool = Field(True, description="sft: train with the data's soft weights where it has them")
    beta: float = Field(0.1, gt=0, description="dpo: strength of the tie to the reference")
    dpo_mask: Literal["loss", "ratio"] = Field(
        "loss",
        description="dpo: loss keeps whole-response log-ratios and masks gradients (the paper); ratio masks both",
    )

    lora_rank: int | None = Field(None, ge=1, description="train a LoRA adapter of this rank instead of all weights")
    lora_alpha: float = Field(32.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: list[str] = Field([], description="names of the linear layers that get an adapter; default: all")

    num_workers: int = Field(1, ge=1, description="Ray Train workers, one process each")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each worker; 0 trains on CPUs")
    cpus_per_worker: float = Field(1, gt=0, description="logical CPUs that each worker reserves")
    fsdp: bool = Field(False, description="shard weights, gradients and optimizer over the workers (FSDP2)")
    max_failures: int = Field(3, ge=0, description="go on at the last checkpoint after this many killed workers")

    evaluation: list[str] = Field([], description="held-out files (any format that score reads) or one masked folder")
    columns: dict[str, str] = Field({}, description="rename columns of files, as wanted=given")
    eval_steps: int = Field(100, ge=1, description="optimizer steps between evaluations")
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a better loss, and return the best model"
    )
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints; one is always at the end")
    logging_steps: int = Field(1, ge=1, description="optimizer steps between lines of metrics")
    report_to: list[str] = Field([], description="trackers that transformers knows, such as wandb or tensorboard")
    resume: bool = Field(True, description="go on where the same run was cut off; --no-resume refuses to")

    @model_validator(mode="before")
    @classmethod
    def _choose_rule(cls, values: Any) -> Any:
        """In-run SFT leaves out what is suspect, unless a share is asked for. What was given wins."""
        if not isinstance(values, dict) or not values.get("in_run") or values.get("objective") == "dpo":
            return values
        if {"preset", "keep_fraction"} & values.keys() or values.get("rule", "suspect") != "suspect":
            return values
        return IN_RUN_SFT | values

    @field_validator("data", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        """YAML and Python may give a single one as text."""
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.early_stopping and not self.evaluation:
            raise ValueError("--early-stopping needs --evaluation FILES: there is no loss to watch")
        if self.objective == "sft" and self.reference_model and not self.fisher:
            raise ValueError("--reference-model is for --objective dpo, and for stability with --fisher")
        self._check_live_values()
        if self.objective == "dpo" and self.rule in BY_LOSS:
            raise ValueError(f"--rule {self.rule} is for --objective sft: a rejected response may well be surprising")
        if self.rule == "surprising" and self.fisher:
            raise ValueError("--rule surprising values no token, so --fisher would not matter; leave it out")
        if not self.lora_rank and (given := self.not_default(("lora_alpha", "lora_dropout", "lora_targets"))):
            raise ValueError(f"{option_name(given[0])} needs --lora-rank: without it no adapter is trained")
        if self.fsdp and not self.gpus_per_worker:
            raise ValueError("--fsdp needs GPUs: give --gpus-per-worker")
        if self.fsdp and self.dtype == "float64":
            raise ValueError("--fsdp trains in float32 or bfloat16")
        return self

    def _check_live_values(self) -> None:
        if not self.in_run:
            own = LiveValueOptions.model_fields.keys() - TrainConfig.__annotations__.keys()
            if given := self.not_default(own):
                raise ValueError(f"{option_name(given[0])} needs --in-run: a masked data set already has its values")
            if len(self.data) > 1:
                raise ValueError("--data takes one folder that `mask` wrote; --in-run takes several files")
            return
        if not self.validation:
            raise ValueError("--in-run needs --validation FILES of the target task")
        if self.rule == "none":
            raise ValueError("--rule none leaves nothing out: train without --in-run")
        self._check_validation_objective()
        self._check_settings_of_share("keep_fraction")
        check_decoder_weights(self.parameters, "--in-run scores")
        one_target(self.validation, "--in-run knows")
        self._check_moments()
        if self.lora_rank:
            raise ValueError("--in-run trains all weights; with --lora-rank use `alphatoken rounds`")
        if self.fsdp:
            raise ValueError("--in-run needs whole weights on every worker, so it does not go with --fsdp")
        if self.gradient_checkpointing:
            raise ValueError("--in-run reads activations of the forward pass, so not with --gradient-checkpointing")

    def _check_settings_of_share(self, *names: str) -> None:
        if self.rule != "share" and not self.preset and (given := self.not_default(names)):
            raise ValueError(f"{option_name(given[0])} is a setting of --rule share, not of {self.rule}")

    @property
    def uses_moments(self) -> bool:
        """Whether values need the optimizer's second moments."""
        return self.preconditioner == "adam" and self.rule in BY_VALUE

    def _check_moments(self) -> None:
        if self.uses_moments and not self.optimizer.startswith("adamw"):
            raise ValueError(f"--preconditioner adam needs an AdamW optimizer, not {self.optimizer}")

    def _check_validation_objective(self) -> None:
        if self.validation_objective != "sft":
            raise ValueError("--validation-objective dpo is for `alphatoken score` and `alphatoken direction`")

    @property
    def stage(self) -> str:
        """What run.json and manifest.json call it."""
        return "train"

    @property
    def folder(self) -> str:
        """--data where it is one folder."""
        return self.data[0]

    @property
    def trains_on_files(self) -> bool:
        """Whether --data is files to encode. Preference pairs come from a folder also for --in-run."""
        return self.in_run and self.objective == "sft"

    @property
    def data_kind(self) -> str:
        """What the files are encoded as: rows, pairs or prompts."""
        return "rows" if self.objective == "sft" else "pairs"

    @property
    def checkpoint_steps(self) -> int:
        """Every evaluation needs a checkpoint where the best one is wanted."""
        return self.eval_steps if self.early_stopping else self.save_steps

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer step, over all workers."""
        return self.per_device_batch_size * self.gradient_accumulation * self.num_workers
