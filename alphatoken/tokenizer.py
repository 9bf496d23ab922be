"""A model's tokenizer and configuration, without its weights. Quick to import: CPU tasks need no model code."""

from pathlib import Path
from typing import TYPE_CHECKING

from alphatoken.adapters import base_of, is_adapter, resolve_base
from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(name: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Of an adapter folder without one: its base model's. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    if is_adapter(folder) and not Path(folder, "tokenizer_config.json").is_file():
        folder = resolve_base(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error


def load_config(name: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """The model's configuration, without its weights.

    Raises:
        UserError: there is none, or `name` is an adapter. Where those are known, ask for their `base_of`.
    """
    from transformers import AutoConfig

    if is_adapter(name):
        raise UserError(
            f"{name} is a LoRA adapter: score and direction take it as it is, everything else takes whole models; "
            "merge it into its base model"
        )
    try:
        return AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        place = "" if Path(name).exists() else f"there is no folder {name}, and from the hub: "
        raise UserError(f"cannot load the configuration of model {name!r}: {place}{first_line(error)}") from error


def check_same_vocabulary(model: str, reference: str, trust_remote_code: bool = False) -> None:
    """Raises UserError where the reference model cannot have a log-probability for every token of the model."""
    ours, theirs = (
        load_config(base_of(name), trust_remote_code).get_text_config().vocab_size for name in (model, reference)
    )
    if ours != theirs:
        raise UserError(
            f"--reference-model {reference} has a vocabulary of {theirs} tokens, --model {model} one of {ours}: give "
            "the model that training starts from, or one with its tokenizer"
        )


def end_of_turn_ids(model_config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Token ids with which the model may end its turn."""
    ids: set[int] = set()
    for found in (model_config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return ids
