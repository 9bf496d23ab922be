"""What `alphatoken generate` and `alphatoken pair` can be told."""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from alphatoken.config import ModelOptions, StageConfig
from alphatoken.credentials import SECRET_PARAMETERS
from alphatoken.errors import option_names

EngineName = Literal["auto", "vllm", "transformers"]
OF_JUDGE = {  # what each takes, beside what all do
    "verifier": {"verifier", "margin", "max_pairs"},
    "reward-model": {"judge_model", "margin", "max_pairs"},
    "reference": set(),
    "vllm-judge": {"judge_model", "judge_template", "judge_tokens", "margin", "max_pairs"},
}
OF_JUDGES = set[str]().union(*OF_JUDGE.values())
JUDGES = tuple(OF_JUDGE)


def _no_empty_text(stop: list[str]) -> list[str]:
    if "" in stop:
        raise ValueError("an empty text would end every response at its start: give a text, or no --stop")
    return stop


Stops = Annotated[list[str], AfterValidator(_no_empty_text)]


def check_verifier(value: str) -> str:
    """Of the name alone: whether it can be loaded, its stage finds out."""
    if value not in ("number", "exact", "math") and not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise ValueError("give number, exact, math, or a function as module:function")
    return value


class EngineOptions(BaseModel):
    """What runs the model that generates."""

    engine: EngineName = Field("auto", description="auto: vllm where it is installed, else transformers (slow)")
    replicas: str = Field("1", pattern=r"^[1-9][0-9]*(:[1-9][0-9]*)?$", description="N, or MIN:MAX to autoscale")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of each replica; 0 generates on CPUs")
    cpus_per_replica: float = Field(1, gt=0, description="logical CPUs that each replica reserves")
    tensor_parallel: int = Field(1, ge=1, description="vllm: GPUs that share one replica's weights")
    cpu_cache_gb: int = Field(1, ge=1, description="vllm on CPUs: memory for keys and values, in GB")
    engine_options: dict[str, Any] = Field(
        {}, description="vllm: more engine arguments, as name=value: gpu_memory_utilization=0.8"
    )

    @field_validator("engine_options")
    @classmethod
    def _typed(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The command line gives text: 16 is a number, and true a truth value, as in a YAML file."""
        if secret := [name for name in value if SECRET_PARAMETERS.fullmatch(name.rpartition("_")[2])]:
            raise ValueError(
                f"{secret[0]} is a secret, which would stand in manifests and logs; give it through the environment "
                "(HF_TOKEN)"
            )
        return {name: _from_yaml(name, item) if isinstance(item, str) else item for name, item in value.items()}

    @property
    def replica_range(self) -> tuple[int, int]:
        """(minimum, maximum) number of engine replicas."""
        low, _, high = self.replicas.partition(":")
        return int(low), int(high or low)

    @model_validator(mode="after")
    def _ranges(self):
        low, high = self.replica_range
        if high < low:
            raise ValueError(f"--replicas {self.replicas}: the maximum is below the minimum")
        if self.tensor_parallel > 1 and self.engine == "transformers":
            raise ValueError("--tensor-parallel is for --engine vllm")
        if self.engine_options and self.engine == "transformers":
            raise ValueError("--engine-options are for --engine vllm")
        return self


def _from_yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{name}={text} is no value that YAML can read: close its brackets and quotes") from None


class SamplingOptions(BaseModel):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0: the likeliest token every time")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens that hold this probability")
    max_new_tokens: int = Field(512, ge=1, description="longest response in tokens")
    stop: Stops = Field([], description="texts that end a response, besides the model's own end of turn")
    seed: int = Field(0, description="of all samples: each draws by (seed, prompt, sample number)")


class GenerateConfig(StageConfig, ModelOptions, EngineOptions, SamplingOptions):
    """Fresh responses to prompts, sampled from the model that is about to be trained."""

    prompts: list[str] = Field(min_length=1, description="files with prompts, in any format that score reads")
    samples: int = Field(4, ge=1, le=1000, description="responses per prompt")
    columns: dict[str, str] = Field(
        {}, description="rename input columns, as wanted=given: prompt=question answer=solution"
    )
    chat: bool = Field(False, description="ask prompts of plain text as a user's message, through the chat template")
    chat_template: str | None = Field(None, description="file with a Jinja chat template; default: the tokenizer's own")
    max_length: int | None = Field(
        None, ge=2, description="longest prompt and response together, in tokens; default: what the model can hold"
    )
    limit: int | None = Field(None, ge=1, description="prompts used, from the start of each file")
    shard_rows: int = Field(1024, ge=1, description="about this many responses per output shard")

    @model_validator(mode="after")
    def _greedy_once(self) -> "GenerateConfig":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"--temperature 0 gives the same response {self.samples} times: use --samples 1")
        return self


class PairConfig(StageConfig, EngineOptions):
    """Preference pairs from sampled responses, by a judge."""

    input: str = Field(description="folder that `alphatoken generate` wrote")
    judge: str = Field("verifier", description=f"one of {', '.join(JUDGES)}")
    verifier: str = Field(
        "number", description="verifier: number, exact, math (math-verify) or your own function, as module:function"
    )
    judge_model: str | None = Field(
        None, description="reward-model: sequence classifier with one label; vllm-judge: the LLM that is asked"
    )
    judge_template: str | None = Field(
        None, description="vllm-judge: file with the question, with {prompt}, {first} and {second}; it answers A or B"
    )
    margin: float | None = Field(
        None, ge=0, description="least difference of scores between chosen and rejected; default: any difference"
    )
    max_pairs: int = Field(1, ge=1, description="pairs per prompt: best against worst, second best against ...")
    judge_tokens: int = Field(8, ge=1, description="vllm-judge: longest verdict in tokens")
    batch_tokens: int = Field(4096, ge=16, description="reward-model: computed positions per batch")
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")

    @field_validator("judge")
    @classmethod
    def _known_judge(cls, value: str) -> str:
        if value not in JUDGES:
            raise ValueError(f"there is no such judge; choose one of {', '.join(JUDGES)}")
        return value

    _verifier_name = field_validator("verifier")(check_verifier)

    @model_validator(mode="after")
    def _judge_has_a_model(self) -> "PairConfig":
        if self.judge in ("reward-model", "vllm-judge") and not self.judge_model:
            raise ValueError(f"--judge {self.judge} needs --judge-model")
        if given := self.not_default(OF_JUDGES - OF_JUDGE[self.judge]):
            names = option_names(given)
            raise ValueError(f"{names}: --judge {self.judge} does not use it")
        return self
