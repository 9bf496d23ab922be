"""What `mask` can be told."""

from typing import Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from alphatoken.config import Scope, StageConfig
from alphatoken.errors import UserError, option_name

Rule = Literal["auto", "share", "suspect", "surprising"]
PAPER = {"keep_fraction": 0.5, "stability_weight": 1.5}
OF_SHARE = ("keep_fraction", "scope", "min_value", "drop_sequences")


class MaskConfig(StageConfig):
    """Which scored tokens are kept. Needs no model and no GPU."""

    input: str = Field(description="folder that `alphatoken score` wrote")
    preset: Literal["paper"] | None = Field(None, description="paper: keep-fraction 0.5, stability-weight 1.5")
    rule: Rule = Field(
        "auto",
        description="share: a share of the tokens is kept, those of the highest values; suspect: all but tokens of a "
        "negative value that surprise the model, where more do than validation tokens of their class, and rows that "
        "surprise it as a whole; surprising: the same whatever the value; auto: suspect for rows that were scored "
        "along a direction of validation rows, unless a setting of share is given",
    )
    keep_fraction: float = Field(
        0.8, gt=0, le=1, description="rule share: part of the response tokens to keep (the paper's rho)"
    )
    scope: Scope = Field(
        "sequence", description="rule share: one threshold per response, or one for the whole data set"
    )
    min_value: FiniteFloat | None = Field(None, description="rule share: also drop tokens with a value below this")
    drop_sequences: float = Field(
        0.0, ge=0, lt=1, description="rule share: first drop this share of rows, the lowest by mean value"
    )
    protect: list[str] = Field([], description="token classes that are always kept, such as end-of-turn")
    stability_weight: FiniteFloat = Field(1.5, ge=0, description="the paper's lambda")
    target_weights: dict[str, FiniteFloat] = Field(
        {},
        description="of a folder scored for several targets: weights of their values in the sum, as target=weight; "
        "default 1 each",
    )
    weights: bool = Field(False, description="also write soft weights: 1 where kept, by rank below 1 elsewhere")

    @field_validator("target_weights", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """math=1,code=0.5 as one word is math=1 code=0.5."""
        if not isinstance(value, dict) or not any(isinstance(item, str) and "," in item for item in value.values()):
            return value
        parts = [part.partition("=") for part in ",".join(f"{name}={item}" for name, item in value.items()).split(",")]
        return {name: item for name, _, item in parts}

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: dict) -> dict:
        """A preset fills what was not given; what was given wins."""
        if isinstance(values, dict) and values.get("preset") == "paper":
            return PAPER | values
        return values

    @model_validator(mode="after")
    def _one_rule(self) -> "MaskConfig":
        if self.rule not in ("auto", "share") and (given := self.settings_of_share):
            if self.preset and given[0] == "keep_fraction" and self.keep_fraction == PAPER["keep_fraction"]:
                raise ValueError(f"--preset {self.preset} is for --rule share, not for {self.rule}")
            raise ValueError(f"{option_name(given[0])} is a setting of --rule share, not of {self.rule}")
        return self

    @property
    def settings_of_share(self) -> list[str]:
        """Those that were given; beside a rule, as a manifest has it, those that are not as they would be anyway."""
        given = [name for name in OF_SHARE if name in self.model_fields_set]
        return given if self.rule == "auto" else [name for name in given if name in self.not_default(OF_SHARE)]


def rule_for(config: MaskConfig, scored: dict) -> str:
    """share, suspect or surprising: what was asked for, or what suits a SCORED folder by its manifest. UserError where
    the folder does not have what the rule needs.
    """
    lacks = None
    if scored.get("pairs"):
        lacks = "has preference pairs, whose rejected responses may well be surprising"
    elif not scored.get("loss_profile"):
        lacks = (
            "knows no losses of validation rows: it was scored without a direction, or by an earlier version; score "
            "again with --validation"
        )
    if config.rule == "auto":
        return "share" if lacks or config.settings_of_share or config.preset else "suspect"
    if config.rule != "share" and lacks:
        raise UserError(f"--rule {config.rule} cannot be used: {config.input} {lacks}")
    return config.rule
