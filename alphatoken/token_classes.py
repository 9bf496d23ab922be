"""What each token id is: its text and one of six classes, so that mask and show need no tokenizer."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken.adapters import base_of
from alphatoken.errors import UserError
from alphatoken.schema import TOKEN_CLASSES
from alphatoken.tokenizer import end_of_turn_ids, load_config, load_tokenizer

TOKEN_CLASS_NAMES = ("end-of-turn", "template", "digits", "punctuation", "whitespace", "words")

# Tokens that end an assistant turn in common chat templates. <|endoftext|> only counts where it is an EOS token.
END_OF_TURN_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",  # Cohere: before the one above
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
)

# RE2 patterns over the whole text of a token
WHITESPACE = r"^[\s\p{Z}\x{85}]+$"
DIGITS = r"^[ ]?\p{N}+$"
LETTERS_OR_DIGITS = r"[\p{L}\p{M}\p{N}\x{FFFD}]"  # U+FFFD: a piece of a letter or symbol of several bytes


def token_class_table(tokenizer: Any, eos_ids: Iterable[int], vocab_size: int | None = None) -> pa.Table:
    """One row per token id from 0 (schema.TOKEN_CLASSES).

    eos_ids: the ids that end generation. vocab_size: the model's, where it is padded beyond the tokenizer's; ids that
    no token has are of class template with empty text. Raises UserError for a tokenizer without a fast backend.
    """
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of {tokenizer.name_or_path} has no fast version: convert it to tokenizer.json.")
    vocabulary = tokenizer.get_vocab()
    size = max(max(vocabulary.values()) + 1, vocab_size or 0)
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    texts = _token_texts(tokenizer.backend_tokenizer, size)
    for token_id, content in added.items():
        texts[token_id] = content
    table_texts = pa.array(texts, pa.string())

    classes = _classes_by_text(table_texts)
    unassigned = np.ones(size, bool)
    unassigned[list(vocabulary.values())] = False
    template = unassigned | np.isin(np.arange(size), [*added, *tokenizer.all_special_ids])
    whitespace = TOKEN_CLASS_NAMES.index("whitespace")
    # Some vocabularies keep runs of blanks as added tokens: they are text, not template.
    classes[template & (classes != whitespace)] = TOKEN_CLASS_NAMES.index("template")
    ends = [vocabulary[name] for name in END_OF_TURN_TOKENS if name in vocabulary]
    ends += [token_id for token_id in (*eos_ids, tokenizer.eos_token_id) if token_id is not None and token_id < size]
    classes[ends] = TOKEN_CLASS_NAMES.index("end-of-turn")

    dictionary = pa.DictionaryArray.from_arrays(pa.array(classes, pa.int8()), pa.array(TOKEN_CLASS_NAMES))
    return pa.table([pa.array(np.arange(size, dtype=np.int32)), table_texts, dictionary], schema=TOKEN_CLASSES)


def class_ids(table: pa.Table) -> np.ndarray:
    """int8 (V,): for each token id the index of its class in TOKEN_CLASS_NAMES."""
    names = table["token_class"].cast(pa.string())  # a file may hold the dictionary in another order
    classes = pc.index_in(names, pa.array(TOKEN_CLASS_NAMES)).to_numpy()
    ids = np.empty(len(table), np.int8)
    ids[table["token_id"].to_numpy()] = classes
    return ids


def model_token_classes(model: str, trust_remote_code: bool = False) -> pa.Table:
    """`token_class_table` of a model's tokenizer and vocabulary."""
    tokenizer, config = load_tokenizer(model, trust_remote_code), load_config(base_of(model), trust_remote_code)
    return token_class_table(tokenizer, end_of_turn_ids(config, tokenizer), config.get_text_config().vocab_size)


@cache  # a worker asks again for every window
def class_of_ids(model: str, trust_remote_code: bool = False) -> np.ndarray:
    """int8 (V,): the class of each token id of a model."""
    return class_ids(model_token_classes(model, trust_remote_code))


def check_class_names(names: Iterable[str]) -> None:
    """Raises UserError for a name that is not a token class."""
    unknown = [name for name in names if name not in TOKEN_CLASS_NAMES]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such token class; choose from {', '.join(TOKEN_CLASS_NAMES)}.")


def _token_texts(backend: Any, size: int) -> list[str]:
    """(V,) how each token reads in running text; a partial UTF-8 piece reads as U+FFFD.

    Each id is decoded behind a letter, because decoders of the SentencePiece kind strip the first blank of a text.
    """
    anchor = next((i for name in ("a", "▁a", "Ġa") if (i := backend.token_to_id(name)) is not None), None)
    if anchor is None:
        return backend.decode_batch([[token_id] for token_id in range(size)], skip_special_tokens=False)
    skip = len(backend.decode([anchor], skip_special_tokens=False))
    pairs = backend.decode_batch([[anchor, token_id] for token_id in range(size)], skip_special_tokens=False)
    return [text[skip:] for text in pairs]


def _classes_by_text(texts: pa.Array) -> np.ndarray:
    """int8 (V,): whitespace, digits, punctuation or words."""
    whitespace, digits, letters = (
        pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
        for pattern in (WHITESPACE, DIGITS, LETTERS_OR_DIGITS)
    )
    names = np.select([whitespace, digits, ~letters], ["whitespace", "digits", "punctuation"], "words")
    return np.array([TOKEN_CLASS_NAMES.index(name) for name in names], np.int8)
