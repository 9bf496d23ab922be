"""What `alphatoken fisher` can be told."""

from pydantic import Field, field_validator

from alphatoken.config import ModelOptions, Parameters, StageConfig, check_parameters
from alphatoken.generate_config import EngineOptions


class FisherConfig(StageConfig, ModelOptions, EngineOptions):
    """The diagonal Fisher of the reference model (Eq. 5)."""

    prompts: list[str] = Field(min_length=1, description="files with prompts, in any format that score reads")
    parameters: Parameters = "all-linear"
    num_prompts: int = Field(1000, ge=1, description="prompts used, from the start of the files")
    max_prompt_tokens: int = Field(256, ge=1, description="longer prompts are cut at their start")
    max_new_tokens: int = Field(128, ge=1, description="tokens sampled per prompt")
    columns: dict[str, str] = Field({}, description="rename input columns, as wanted=given: prompt=question")
    seed: int = Field(0, description="of all samples: each draws by (seed, prompt)")

    _parameters = field_validator("parameters")(check_parameters)
