"""What `alphatoken evaluate` can be told."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from alphatoken.config import DataOptions, ModelOptions


class EvaluateConfig(DataOptions, ModelOptions):
    """Loss, multiple choice and exact answers of one or more models on named files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: list[str] = Field(  # type: ignore[assignment]
        min_length=1, description="folders or hub names of causal LMs; with two, the second is compared with the first"
    )
    loss: dict[str, str] = Field(
        {}, description="name=FILE: loss and perplexity of response tokens, or of all tokens of rows with `text`"
    )
    choices: dict[str, str] = Field({}, description="name=FILE: multiple choice, HellaSwag or ARC style rows")
    answers: dict[str, str] = Field({}, description="name=FILE: generated answers against each row's own response")
    verifier: Literal["number", "exact"] = Field(
        "number", description="what of an answer has to agree: its final number, or the text up to whitespace"
    )
    limit: int | None = Field(None, ge=1, description="rows per file, from its start")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer in tokens")
    lm_eval: list[str] = Field([], description="tasks of lm-eval to run as well, if that is installed")
    output: str | None = Field(None, description="JSON file to write, a local path or a URI")

    @field_validator("model", mode="before")
    @classmethod
    def _one_model(cls, value: Any) -> Any:
        """YAML may give a single one as text."""
        return [value] if isinstance(value, str) else value

    @field_validator("lm_eval", mode="before")
    @classmethod
    def _split_tasks(cls, value: Any) -> Any:
        """lm-eval's own command line separates tasks by commas."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            return value
        return [task.strip() for item in items for task in item.split(",") if task.strip()]

    @field_validator("output")
    @classmethod
    def _output_is_json(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".json"):
            raise ValueError("give a file name that ends in .json")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateConfig":
        if not (self.loss or self.choices or self.answers or self.lm_eval):
            raise ValueError("nothing to evaluate: give --loss, --choices or --answers name=FILE, or --lm-eval TASKS")
        if len(set(self.model)) < len(self.model):
            raise ValueError("--model names a model twice")
        return self

    @property
    def files(self) -> list[tuple[str, str, str]]:
        """(kind, name, file) of everything to evaluate, in the order of the table."""
        kinds = {"loss": self.loss, "choices": self.choices, "answers": self.answers}
        return [(kind, name, path) for kind, files in kinds.items() for name, path in files.items()]
