"""From a row of preference data to the token ids of its prompt and of its two responses.

Formats, after renaming by `DataOptions.columns`; `chosen` and `rejected` are always there:
- tokens: `prompt_ids`, `chosen_ids`, `rejected_ids` (what `alphatoken pair` writes: the very tokens that were sampled);
- TRL's standard and conversational ones: `prompt` with `chosen` and `rejected`, each text or messages. A prompt of
  messages may go with responses of text, which then are one assistant turn;
- TRL's implicit prompt: no `prompt`; it is what both responses begin with: common messages, or common words (in
  Anthropic's format only up to the last "Assistant:");
- alpaca: `instruction`, `input` (optional).

Both responses continue the same prompt tokens. Where a tokenizer merges the prompt's last characters into one of the
responses, the prompt ends before them in both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from alphatoken.chat import check_messages
from alphatoken.config import DataOptions
from alphatoken.encode import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, Encoder, rename_columns
from alphatoken.errors import BadRowError, UserError
from alphatoken.schema import BRANCHES
from alphatoken.sources import ReadUnit, first_rows

PAIR_COLUMNS = frozenset(BRANCHES)
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
KNOWN_COLUMNS = frozenset({"id", "prompt", "instruction", "input", *PAIR_COLUMNS, *TOKEN_COLUMNS})
LAST_TURN = "\n\nAssistant:"  # of a dialogue written as one text, as in Anthropic's hh-rlhf


@dataclass(frozen=True)
class EncodedPair:
    """Token ids; prompt + chosen and prompt + rejected are rows that a model sees."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated: bool  # whether a response was cut at max_length


def is_pair(columns: set[str], renamed: dict[str, str]) -> bool:
    """Whether a row with these columns is a preference pair."""
    there = (columns - set(renamed.values())) | {wanted for wanted, given in renamed.items() if given in columns}
    return there >= PAIR_COLUMNS or there >= set(TOKEN_COLUMNS)


def is_pair_data(objective: str, units: Sequence[ReadUnit], renamed: dict[str, str]) -> bool:
    """Whether the rows are preference pairs: as the user says (sft or dpo), else (auto) by each file's first row.

    Raises UserError where some files have pairs and others have not.
    """
    if objective != "auto":
        return objective == "dpo"
    found = {is_pair(set(row), renamed): unit.path for unit, row in first_rows(units)}
    if len(found) > 1:
        raise UserError(f"{found[True]} holds preference pairs, {found[False]} does not: run them apart.")
    return True in found


def check_pair_source(units: Iterable[ReadUnit], options: DataOptions) -> None:
    """Whether the first row of each file is a pair. Raises UserError."""
    unknown = sorted(set(options.columns) - KNOWN_COLUMNS)
    if unknown:
        known = ", ".join(sorted(KNOWN_COLUMNS))
        raise UserError(f"--columns {', '.join(unknown)}: no such column to fill; known for pairs are {known}.")
    for unit, row in first_rows(units):
        missing = sorted(set(options.columns.values()) - set(row))
        if missing:
            raise UserError(
                f"{unit.path} has no column {', '.join(missing)} that --columns names: it has {', '.join(row)}."
            )
        if not is_pair(set(row), options.columns):
            raise UserError(
                f"{unit.path}: the rows are no preference pairs: found {', '.join(sorted(row))}; needed are chosen and "
                "rejected, with prompt (or instruction) or without."
            )


class PairEncoder:
    """Encodes preference rows with the encoder of a tokenizer."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.options = encoder.options

    def encode(self, row: dict) -> EncodedPair:
        """Raises BadRowError with the reason for a row that cannot be used, UserError without a chat template."""
        self.encoder.typed = None
        row = rename_columns(row, self.options.columns)
        if not is_pair(set(row), {}):
            raise BadRowError(f"the row has no chosen and rejected: it has {', '.join(sorted(row))}")
        if all(row.get(name) is not None for name in TOKEN_COLUMNS):
            prompt, chosen, rejected = (self.encoder.token_ids(row, name) for name in TOKEN_COLUMNS)
            self._check_prompt(row, prompt)
        else:
            prompt, chosen, rejected = self._from_text(row)
        return self._fit(prompt, chosen, rejected)

    def _check_prompt(self, row: dict, ids: list[int]) -> None:
        """Ids of another vocabulary would be read as other words: a pair sampled from another model, for one."""
        text, decode = row.get("prompt"), self.encoder.tokenizer.decode
        if not isinstance(text, str):
            return
        readings = (decode(ids, skip_special_tokens=skip) for skip in (False, True))
        if "".join(text.split()) not in ("".join(reading.split()) for reading in readings):
            raise BadRowError(
                "prompt_ids are not the row's prompt in this model's tokens: give pairs of another model's samples "
                "without prompt_ids, chosen_ids and rejected_ids, and their prompt as messages"
            )

    def _from_text(self, row: dict) -> tuple[list[int], list[int], list[int]]:
        prompt, chosen, rejected = _prompt_and_responses(row, bool(self.encoder.tokenizer.chat_template))
        found = [
            self._branch(prompt, response, name) for response, name in zip((chosen, rejected), BRANCHES, strict=True)
        ]
        (chosen_ids, chosen_start), (rejected_ids, rejected_start) = found
        start = min(chosen_start, rejected_start, len(commonprefix([chosen_ids, rejected_ids])))
        return chosen_ids[:start], chosen_ids[start:], rejected_ids[start:]

    def _branch(self, prompt: Any, response: Any, name: str) -> tuple[list[int], int]:
        """(ids of prompt and response, without what a template puts behind the response; where the response begins)."""
        try:
            ids, mask = self.encoder.encode_completion({"prompt": prompt, "completion": response})
        except BadRowError as error:
            raise BadRowError(f"{name}: {str(error).replace('completion', name)}") from error
        start, stop = mask.index(True), len(mask) - mask[::-1].index(True)
        if not all(mask[start:stop]):
            raise BadRowError(f"{name} has more than one assistant turn: give the earlier ones as part of the prompt")
        return ids[:stop], start

    def _fit(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
        if not prompt:
            raise BadRowError("the prompt has no tokens, so the first token of a response has nothing to come from")
        if not (chosen and rejected):
            raise BadRowError(f"{'rejected' if chosen else 'chosen'} is empty")
        length, longest = len(prompt) + max(len(chosen), len(rejected)), self.options.max_length
        if length > longest and self.options.too_long == "quarantine":
            raise BadRowError(f"the pair has a row of {length} tokens, more than max_length {longest}")
        left = longest - len(prompt)
        if left < 1:
            raise BadRowError(f"the prompt has {len(prompt)} tokens: nothing of a response is left at {longest}")
        if chosen[:left] == rejected[:left]:
            raise BadRowError("chosen and rejected are the same" + (" after truncation" if chosen != rejected else ""))
        return EncodedPair(prompt, chosen[:left], rejected[:left], length > longest)


def _prompt_and_responses(row: dict, has_template: bool) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected): all three text, or all three messages."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for name in BRANCHES:
        if not isinstance(row.get(name), str | list | tuple | dict):
            raise BadRowError(f"{name} is neither text nor messages")
    if row.get("messages") and isinstance(chosen, str) and isinstance(rejected, str):
        # Of a pair by `alphatoken pair`, whose prompt is the rendered conversation
        prompt = check_messages(row["messages"], "messages")
    elif row.get("prompt") is not None:
        prompt = row["prompt"]
    elif row.get("instruction") is not None:
        prompt = _alpaca_prompt(row, has_template)
    else:
        return _implicit_prompt(chosen, rejected)
    if isinstance(prompt, str):
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise BadRowError("one of chosen and rejected is text and the other messages")
        if isinstance(chosen, str):
            return prompt, chosen, rejected
        prompt = [{"role": "user", "content": prompt}]
    messages = check_messages(prompt, "prompt")
    return messages, _as_turns(chosen, messages, BRANCHES[0]), _as_turns(rejected, messages, BRANCHES[1])


def _as_turns(response: Any, prompt: list[dict], name: str) -> list[dict]:
    """The messages of a response; without the prompt, which some data sets repeat in front of it."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    turns = check_messages(response, name)
    repeats = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats else turns


def _alpaca_prompt(row: dict, has_template: bool) -> Any:
    instruction, extra = row["instruction"], row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise BadRowError("instruction or input is not text")
    if has_template:
        return [{"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}]
    return (ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT).format(instruction=instruction, input=extra)


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What both begin with is the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = commonprefix([chosen, rejected])
        turn = common.rfind(LAST_TURN)
        stop = turn + len(LAST_TURN) if turn >= 0 else _last_word_end(common)
        if chosen == rejected:
            raise BadRowError("chosen and rejected are the same")
        if not common[:stop].strip():
            raise BadRowError("there is no prompt, and chosen and rejected begin with no common word that could be one")
        return chosen[:stop], chosen[stop:], rejected[stop:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRowError("one of chosen and rejected is text and the other messages")
    first, second = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    if shared == len(first) == len(second):
        raise BadRowError("chosen and rejected are the same")
    if not shared:
        raise BadRowError("there is no prompt, and chosen and rejected begin with no common message that could be one")
    return first[:shared], first[shared:], second[shared:]


def _last_word_end(text: str) -> int:
    """Where the last whole word of a common beginning ends: a blank belongs to what follows, a line end does not."""
    for index in range(len(text) - 1, -1, -1):
        if text[index].isspace():
            return index + (text[index] == "\n")
    return 0
