"""The encoder of a model: its tokenizer, and the longest row that it can take."""

from alphatoken.adapters import base_of
from alphatoken.config import DataOptions
from alphatoken.encode import Encoder
from alphatoken.tokenizer import load_config, load_tokenizer

LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm", "biogpt"}  # a longer row fails, on GPUs all do


def make_encoder(model: str, options: DataOptions, trust_remote_code: bool = False) -> Encoder:
    """The encoder of a model's tokenizer; its configuration alone is read, not its weights.

    Rows are cut at `options.max_length`, and at the positions that a model has learned where those are fewer.
    """
    config = load_config(base_of(model), trust_remote_code).get_text_config()
    if config.model_type in LEARNED_POSITIONS and options.max_length > config.max_position_embeddings:
        options = options.model_copy(update={"max_length": config.max_position_embeddings})
    return Encoder(load_tokenizer(model, trust_remote_code), options, config.vocab_size)
