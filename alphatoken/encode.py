"""From a row of user data to token ids and the mask of its response.

Formats, after renaming by `DataOptions.columns`:
- tokens: `input_ids` with `response_mask` or `labels` (input_ids or -100, not shifted);
- messages: `messages`, every assistant turn is response;
- prompt_completion: `prompt` and `completion`, both text (prompt and completion verbatim, then EOS, as TRL's
  SFTTrainer does) or both messages (assistant turns of the completion are response);
- alpaca: `instruction`, `input` (optional), `output` or `response`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from alphatoken.chat import ChatRenderer, Span, check_messages, mask_spans
from alphatoken.config import DataOptions
from alphatoken.errors import BadRowError, UserError
from alphatoken.schema import IGNORE_INDEX
from alphatoken.sources import ReadUnit, first_rows
from alphatoken.special_tokens import SpecialTokens

# Where several fit, the first that uses a renamed column, else the first.
FORMATS: dict[str, tuple[frozenset[str], ...]] = {
    "tokens": (frozenset({"input_ids", "response_mask"}), frozenset({"input_ids", "labels"})),
    "messages": (frozenset({"messages"}),),
    "prompt_completion": (frozenset({"prompt", "completion"}),),
    "alpaca": (frozenset({"instruction", "output"}), frozenset({"instruction", "response"})),
}
ACCEPTED = (
    "messages; prompt + completion; instruction (+ input) + output or response; input_ids + response_mask or labels"
)
COLUMNS = frozenset({"id", "input"}).union(*(columns for fits in FORMATS.values() for columns in fits))

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Encoded:
    """input_ids, response_mask: (T,) each. truncated: whether the row was cut at max_length."""

    input_ids: list[int]
    response_mask: list[bool]
    truncated: bool


class Encoder:
    """Encodes rows for one tokenizer.

    vocab_size: of the model; ids at or above it are refused.

    Raises:
        UserError: the tokenizer cannot be used.
    """

    def __init__(self, tokenizer: Any, options: DataOptions, vocab_size: int) -> None:
        _check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.options = options
        self.vocab_size = vocab_size
        self.typed: str | None = None  # a special token in the text of the last row, whether it could be used or not

    def encode(self, row: dict) -> Encoded:
        """Token ids of a row and which of them are response, both (T,), T at most `options.max_length`.

        Raises:
            BadRowError: the row cannot be used, with the reason.
            UserError: it needs a chat template and the tokenizer has none.
        """
        self.typed = None
        row = rename_columns(row, self.options.columns)
        try:
            name = detect_format(set(row), self.options.columns)
        except UserError as error:
            raise BadRowError(str(error)) from error
        encode = {
            "tokens": self._encode_tokens,
            "messages": self._encode_messages,
            "prompt_completion": self._encode_prompt_completion,
            "alpaca": self._encode_alpaca,
        }[name]
        input_ids, mask = encode(row)
        check_ids(input_ids, self.vocab_size)
        _check_mask(mask)
        return self._fit(input_ids, mask)

    def encode_completion(self, row: dict) -> tuple[list[int], list[bool]]:
        """A row of prompt and completion, however long: (input_ids, response_mask). Raises as `encode` does."""
        input_ids, mask = self._encode_prompt_completion(row)
        check_ids(input_ids, self.vocab_size)
        _check_mask(mask)
        return input_ids, mask

    def encode_prompt(self, prompt: str | list[dict]) -> tuple[str, list[int]]:
        """(text, ids) of plain text, or of a conversation up to where its answer begins. Raises as `encode` does."""
        if isinstance(prompt, str):
            ids = self._tokenize(*self._plain([prompt]), True)[0]
            return prompt, ids[:-1] if self._ends_texts and ids[-1:] == [self.tokenizer.eos_token_id] else ids
        literal = self._is_literal(_texts(prompt))
        text = self._chat.render(self.special.hide_in(prompt) if literal else prompt, add_generation_prompt=True)
        text = self.special.reveal(text).text if literal else text
        ids, _ = self._tokenize([text], literal, False)
        return self.special.readable(text) if literal else text, ids

    def token_ids(self, row: dict, column: str) -> list[int]:
        """A column that holds token ids already. Raises BadRowError where they are none of the vocabulary."""
        ids = _integers(row, column)
        check_ids(ids, self.vocab_size)
        return ids

    @cached_property
    def _ends_texts(self) -> bool:
        """Whether the tokenizer puts its EOS behind every text: nothing would be said after a prompt."""
        eos = self.tokenizer.eos_token_id
        return eos is not None and self.tokenizer("a")["input_ids"][-1:] == [eos]

    @cached_property
    def special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    @cached_property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer)

    def _encode_messages(self, row: dict) -> tuple[list[int], list[bool]]:
        _check_no_tools(row)
        return self._encode_chat(check_messages(row["messages"], "messages"), 0)

    def _encode_prompt_completion(self, row: dict) -> tuple[list[int], list[bool]]:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) or isinstance(completion, str):
            return self._encode_text(_text(row, "prompt"), _text(row, "completion"))
        _check_no_tools(row)
        messages = check_messages(prompt, "prompt")
        return self._encode_chat(messages + check_messages(completion, "completion"), len(messages))

    def _encode_alpaca(self, row: dict) -> tuple[list[int], list[bool]]:
        instruction = _text(row, "instruction")
        response = _text(row, "output" if "output" in row else "response")
        extra = _text(row, "input") if row.get("input") is not None else ""
        if self.tokenizer.chat_template:
            user = {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}
            messages = [user, {"role": "assistant", "content": response}]
            return self._encode_chat(check_messages(messages, "messages"), 1)
        prompt = ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT
        return self._encode_text(prompt.format(instruction=instruction, input=extra), response)

    def _encode_tokens(self, row: dict) -> tuple[list[int], list[bool]]:
        input_ids = _integers(row, "input_ids")
        column = "response_mask" if "response_mask" in row else "labels"
        values = _integers(row, column)
        if len(values) != len(input_ids):
            raise BadRowError(f"input_ids has {len(input_ids)} entries, {column} has {len(values)}")
        if column == "response_mask":
            if not set(values) <= {0, 1}:
                raise BadRowError("response_mask has other values than true and false")
            return input_ids, [bool(value) for value in values]
        for position, (label, token_id) in enumerate(zip(values, input_ids, strict=True)):
            if label not in (token_id, IGNORE_INDEX):
                raise BadRowError(
                    f"labels[{position}] is {label}, but labels must be input_ids or {IGNORE_INDEX} at the same "
                    "position: labels shifted by one are not accepted"
                )
        return input_ids, [label != IGNORE_INDEX for label in values]

    def _encode_chat(self, messages: list[dict], first_response: int) -> tuple[list[int], list[bool]]:
        literal = self._is_literal(_texts(messages))
        rendered = self._chat.render_responses(self.special.hide_in(messages) if literal else messages, first_response)
        if literal:
            rendered = self.special.reveal(rendered.text, rendered.spans)
        input_ids, offsets = self._tokenize([rendered.text], literal, False)
        return input_ids, mask_spans(rendered.text, offsets, rendered.spans)

    def _encode_text(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """The response begins where the tokens of prompt and prompt + completion diverge, as in TRL."""
        if not completion.strip():
            raise BadRowError("the response is empty")
        eos = self.tokenizer.eos_token or ""
        pieces, literal = self._plain([prompt, completion.removesuffix(eos)])  # an EOS at the end is the end
        end = self.special.reveal(eos).text if literal else eos
        prompt_ids, _ = self._tokenize(pieces[:1], literal, True)
        input_ids, _ = self._tokenize([*pieces, end], literal, True)
        start = len(commonprefix([prompt_ids, input_ids]))
        return input_ids, [position >= start for position in range(len(input_ids))]

    def _is_literal(self, texts: list[str]) -> bool:
        """Whether special tokens in a row's texts are to be plain text. Raises BadRowError where they are refused."""
        found = self.special.find(texts)
        self.typed = self.typed or found
        if found and self.options.special_tokens_in_text == "quarantine":
            raise BadRowError(f"the text contains the special token {found} (--special-tokens-in-text quarantine)")
        return found is not None and self.options.special_tokens_in_text == "literal"

    def _plain(self, texts: list[str]) -> tuple[list[str], bool]:
        """(texts for `_tokenize`, whether they are literal)."""
        if not self._is_literal(texts):
            return texts, False
        return [self.special.reveal(self.special.hide(text)).text for text in texts], True

    def _tokenize(self, pieces: list[str], literal: bool, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """(ids, offsets) of the joined pieces."""
        text = "".join(pieces)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRowError("the text holds half of a surrogate pair, which is not valid Unicode") from error
        if literal:
            return self.special.encode(text, add_special_tokens)
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def _fit(self, input_ids: list[int], mask: list[bool]) -> Encoded:
        length, longest = len(input_ids), self.options.max_length
        if length <= longest:
            return Encoded(input_ids, mask, False)
        if self.options.too_long == "quarantine":
            raise BadRowError(f"the row has {length} tokens, more than max_length {longest}")
        if not any(mask[:longest]):
            raise BadRowError(
                f"the response starts at token {mask.index(True)} of {length}, beyond max_length {longest}: "
                "nothing of it is left after truncation"
            )
        return Encoded(input_ids[:longest], mask[:longest], True)


def detect_format(columns: set[str], renamed: Collection[str] = ()) -> str:
    """The name in FORMATS that fits the columns; `renamed`: columns that the user chose explicitly, which decide
    where several formats fit. Raises UserError.
    """
    fitting = {name: fit for name, fits in FORMATS.items() for fit in reversed(fits) if fit <= columns}
    if not fitting:
        found = ", ".join(sorted(columns)) or "none"
        raise UserError(f"The columns do not form a known format: found {found}; accepted are {ACCEPTED}.")
    return max(fitting, key=lambda name: len(fitting[name] & set(renamed)))


def rename_columns(row: dict, columns: dict[str, str]) -> dict:
    """The row with the columns given by the user under the wanted names."""
    if not columns:
        return row
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {wanted: row[given] for wanted, given in columns.items() if given in row}


def check_source(units: Iterable[ReadUnit], options: DataOptions, tokenizer: Any) -> None:
    """Checks that need no model: the tokenizer, the format of each file's first row, and the chat template where
    that row needs one. Raises UserError.
    """
    _check_tokenizer(tokenizer)
    unknown = sorted(set(options.columns) - COLUMNS)
    if unknown:
        known = ", ".join(sorted(COLUMNS))
        raise UserError(f"--columns {', '.join(unknown)}: no such column to fill; known are {known}.")
    for unit, row in first_rows(units):
        missing = sorted(set(options.columns.values()) - set(row))
        if missing:
            raise UserError(
                f"{unit.path} has no column {', '.join(missing)} that --columns names: it has {', '.join(row)}."
            )
        row = rename_columns(row, options.columns)
        try:
            name = detect_format(set(row), options.columns)
        except UserError as error:
            raise UserError(f"{unit.path}: {error}") from error
        if name == "messages" or (name == "prompt_completion" and isinstance(row["completion"], list | dict)):
            ChatRenderer(tokenizer)


def _check_tokenizer(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path} has no fast version, which locating the response needs: "
            "convert it to a tokenizer.json."
        )


def _check_no_tools(row: dict) -> None:
    if row.get("tools") not in (None, "", "[]", []):
        raise BadRowError("the row has tools, which are not supported")


def _texts(messages: list[dict]) -> list[str]:
    return [value for message in messages for value in message.values() if isinstance(value, str)]


def _text(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRowError(f"{column} is {_type_name(value)}, not text")
    return value


def _integers(row: dict, column: str) -> list[int]:
    value = row[column]
    value = value.tolist() if hasattr(value, "tolist") else value  # Ray hands out numpy arrays
    if not isinstance(value, list | tuple):
        raise BadRowError(f"{column} is {_type_name(value)}, not a list of whole numbers")
    is_mask = column == "response_mask"
    if not all(isinstance(item, int) and (is_mask or not isinstance(item, bool)) for item in value):
        raise BadRowError(f"{column} has entries that are not whole numbers")
    return list(value)


def _type_name(value: Any) -> str:
    return "missing (null)" if value is None else f"a {type(value).__name__}"


def check_ids(input_ids: list[int], vocab_size: int) -> None:
    """Raises BadRowError unless there are some, all of them of the model's vocabulary."""
    if not input_ids:
        raise BadRowError("the row has no tokens")
    for token_id in (min(input_ids), max(input_ids)):
        if not 0 <= token_id < vocab_size:
            raise BadRowError(f"token id {token_id} is not in the model's vocabulary of {vocab_size}")


def _check_mask(mask: list[bool]) -> None:
    if not any(mask):
        raise BadRowError("the response is empty: no token belongs to it")
    if mask[0]:
        what = "every token is" if all(mask) else "the first token is"
        raise BadRowError(f"{what} response: nothing precedes the first token, so there is nothing to predict it from")
