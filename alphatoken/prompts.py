"""From a row of user data to a prompt to answer, as tokens, and the data set's own answer where it has one.

Formats, after renaming by `columns`: those of encode.py, whose last response is the answer; and the same without a
response: `messages` that end with another role's turn, `prompt` alone (text or messages), `instruction` (+ `input`).
A column `answer` goes before any response of the row, and a column that the user chose before all others.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from alphatoken.chat import check_messages
from alphatoken.encode import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, Encoder, check_ids, rename_columns
from alphatoken.errors import BadRowError, UserError
from alphatoken.sources import ReadUnit, first_rows

PROMPT_COLUMNS = ("input_ids", "messages", "prompt", "instruction")  # the first that is there decides
ANSWER_COLUMNS = ("answer", "completion", "output", "response")
KNOWN_COLUMNS = frozenset({"id", "input", "response_mask", "labels", *PROMPT_COLUMNS, *ANSWER_COLUMNS})


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    prompt: str  # as it sees it
    messages: list[dict] | None  # the conversation; None where the prompt is plain text or tokens
    prompt_ids: list[int]
    answer: str | None


def check_prompt_source(units: list[ReadUnit], columns: dict[str, str]) -> None:
    """Whether the first row of each file has a prompt. Raises UserError."""
    unknown = sorted(set(columns) - KNOWN_COLUMNS)
    if unknown:
        known = ", ".join(sorted(KNOWN_COLUMNS))
        raise UserError(f"--columns {', '.join(unknown)}: no such column to fill; known for prompts are {known}.")
    for unit, row in first_rows(units):
        missing = sorted(set(columns.values()) - set(row))
        if missing:
            raise UserError(
                f"{unit.path} has no column {', '.join(missing)} that --columns names: it has {', '.join(row)}."
            )
        if not set(PROMPT_COLUMNS) & set(rename_columns(row, columns)):
            raise UserError(
                f"{unit.path}: the rows have no prompt: found {', '.join(sorted(row))}; accepted are messages, prompt, "
                "instruction (+ input), or input_ids with response_mask or labels."
            )


def check_room_for_prompt(max_new_tokens: int, context: float) -> None:
    """Raises UserError where a response of that length leaves nothing of `context` tokens."""
    if max_new_tokens >= context:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: prompt and response have {context} tokens "
            "together, by what the model can hold or --max-length; give fewer"
        )


class PromptReader:
    """Rows to prompts for one tokenizer."""

    def __init__(self, encoder: Encoder, longest: int, chat: bool = False) -> None:
        """longest: tokens that leave room for a response. chat: text prompts become a user's message."""
        self.encoder, self.longest, self.chat = encoder, longest, chat

    def read(self, row: dict) -> Prompt:
        """Raises BadRowError with the reason for a row that cannot be used, UserError without a chat template."""
        self.encoder.typed = None
        row = rename_columns(row, self.encoder.options.columns)
        if row.get("tools") not in (None, "", "[]", []):
            raise BadRowError("the row has tools, which are not supported")
        found = self._read(row)
        if not 0 < len(found.prompt_ids) <= self.longest:
            raise BadRowError(
                f"the prompt has {len(found.prompt_ids)} tokens; from 1 to {self.longest} leave room for the response"
            )
        check_ids(found.prompt_ids, self.encoder.vocab_size)  # a tokenizer may know more than the model
        return found

    def _read(self, row: dict) -> Prompt:
        chosen = self.encoder.options.columns
        kind = next((name for name in _chosen_first(PROMPT_COLUMNS, chosen) if row.get(name) is not None), None)
        answer = _answer(row, chosen)
        if kind == "input_ids":
            return self._from_tokens(row, answer)
        if kind == "messages":
            messages = check_messages(row["messages"], "messages")
            if messages[-1]["role"] == "assistant":
                own = row.get("answer") is None and not set(ANSWER_COLUMNS) & set(chosen)
                answer = messages[-1]["content"] if own or answer is None else answer
                messages = messages[:-1]
            return self._from_messages(messages, answer)
        if kind == "prompt":
            if not isinstance(row["prompt"], str):
                return self._from_messages(check_messages(row["prompt"], "prompt"), answer)
            return self._from_text(row["prompt"], answer)
        if kind == "instruction":
            return self._from_instruction(row, answer)
        raise BadRowError(f"the row has no prompt: it has {', '.join(sorted(row)) or 'no columns'}")

    def _from_messages(self, messages: list[dict], answer: str | None) -> Prompt:
        if not messages:
            raise BadRowError("the conversation has no turn before the answer")
        text, ids = self.encoder.encode_prompt(messages)
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        return Prompt(text, plain, ids, answer)

    def _from_text(self, text: str, answer: str | None) -> Prompt:
        if not text.strip():
            raise BadRowError("the prompt is empty")
        if self.chat:
            return self._from_messages([{"role": "user", "content": text}], answer)
        return Prompt(text, None, self.encoder.encode_prompt(text)[1], answer)

    def _from_instruction(self, row: dict, answer: str | None) -> Prompt:
        instruction, extra = row["instruction"], row.get("input") or ""
        if not isinstance(instruction, str) or not isinstance(extra, str):
            raise BadRowError("instruction or input is not text")
        if self.encoder.tokenizer.chat_template:
            content = f"{instruction}\n\n{extra}" if extra else instruction
            return self._from_messages([{"role": "user", "content": content}], answer)
        template = ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT
        return self._from_text(template.format(instruction=instruction, input=extra), answer)

    def _from_tokens(self, row: dict, answer: str | None) -> Prompt:
        encoded = self.encoder.encode(row)
        mask = encoded.response_mask
        stop = len(mask) - mask[::-1].index(True)
        start = max(i for i in range(stop) if not mask[i]) + 1
        decode = self.encoder.tokenizer.decode
        if answer is None and not encoded.truncated:
            answer = decode(encoded.input_ids[start:stop], skip_special_tokens=True)
        return Prompt(decode(encoded.input_ids[:start]), None, encoded.input_ids[:start], answer)


def _chosen_first(names: tuple[str, ...], chosen: Collection[str]) -> list[str]:
    """Those that the user chose by renaming go before the others."""
    return sorted(names, key=lambda name: name not in chosen)


def _answer(row: dict, chosen: Collection[str]) -> str | None:
    """The text of the first answer column; the last turn of one that holds messages."""
    names = _chosen_first(ANSWER_COLUMNS, chosen)
    value: Any = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list | tuple) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if value is None or isinstance(value, str) else str(value)
