"""From a row of user data to what is evaluated on it, and verifiers of answers.

- loss: any format of encode.py, or `text` (every token after the first counts; a long text is cut into windows);
- choices: `query` is the whole prompt. Without it HellaSwag style `context` or `ctx`, or ARC style `question`, asked as
  "Question: ... Answer:"; a row with both is reading comprehension: the context, then the question so asked. With
  `endings` or `choices` (texts, or ARC's own {text, label}) and `label`, `answer`, `gold` or `answerKey`: the label of
  the right choice, or without labels its number from 0 or its letter;
- answers: any format of encode.py; the last response is the reference, what comes before it is the prompt.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from os.path import commonprefix
from typing import Any

from alphatoken.chat import check_messages
from alphatoken.encode import ALPACA_PROMPT, ALPACA_PROMPT_WITH_INPUT, COLUMNS, Encoder, detect_format, rename_columns
from alphatoken.errors import BadRowError, UserError

QUERY = ("query", "context", "ctx", "question")
CHOICES = ("endings", "choices")
ANSWER = ("label", "answer", "gold", "answerKey")
KNOWN_COLUMNS = COLUMNS.union(QUERY, CHOICES, ANSWER, ("text",))

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
NUMBER = rf"(?:(?<![0-9)])-\$?|\$-?)?(?:{DIGITS})"  # in 10-3 the - is no sign; commas count in groups of three only
ANY_NUMBER = re.compile(NUMBER)
MARKED_NUMBER = re.compile(rf"####\s*({NUMBER})")  # right behind: #### is also how Markdown begins a heading


@dataclass(frozen=True)
class Piece:
    """A sequence of a row; the tokens in response_mask count. input_ids, response_mask: (T,)."""

    row_id: int
    input_ids: list[int]
    response_mask: list[bool]
    truncated: bool = False


@dataclass(frozen=True)
class Question:
    """Prompt and choice for every choice. All have the same first `start` tokens; the rest is the choice's."""

    row_id: int
    choices: list[list[int]]
    start: int
    characters: list[int]  # of each choice's text
    answer: int  # index of the right choice
    truncated: bool = False


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, and the text of a right answer."""

    row_id: int
    input_ids: list[int]
    reference: str


class RowReader:
    """Rows to items for one tokenizer. Methods raise BadRowError with the reason for a row that cannot be used, and
    UserError without a chat template where the row needs one.
    """

    def __init__(self, encoder: Encoder, verifier: str, longest_prompt: int) -> None:
        """longest_prompt: tokens that leave room for an answer in the model's positions."""
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.extract = VERIFIERS[verifier]
        self.longest_prompt = longest_prompt

    def pieces(self, row_id: int, row: dict) -> list[Piece]:
        """What the loss is measured on: the encoded row, or the windows of a text.

        A window begins with the last token of the one before: every token of the text but the first counts once.
        """
        renamed = rename_columns(row, self.encoder.options.columns)
        if not _is_text_row(renamed, self.encoder.options.columns):
            encoded = self.encoder.encode(row)
            return [Piece(row_id, encoded.input_ids, encoded.response_mask, encoded.truncated)]
        ids = self._tokenize(_text(renamed, "text"))
        if len(ids) < 2:
            raise BadRowError("the text has fewer than two tokens, so there is nothing to predict")
        step = self.encoder.options.max_length - 1
        windows = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
        return [Piece(row_id, window, [position > 0 for position in range(len(window))]) for window in windows]

    def question(self, row_id: int, row: dict) -> Question:
        """A multiple-choice question. One that is too long loses the start of its prompt, or is refused."""
        row = rename_columns(row, self.encoder.options.columns)
        query, choices, answer = (_first_of(row, names) for names in (QUERY, CHOICES, ANSWER))
        if not (query and choices and answer):
            raise BadRowError(missing_columns(set(row)))
        for name in (choices, answer):
            if row[name] is None:
                raise BadRowError(f"{name} is missing (null)")
        texts, labels = _choice_texts(row[choices])
        index = answer_index(row[answer], labels, len(texts))
        prompt = _choice_prompt(row, query)
        start, ids = self._continuations(prompt, texts)
        surplus = max(map(len, ids)) - self.encoder.options.max_length
        if surplus > 0 and (surplus >= start or self.encoder.options.too_long == "quarantine"):
            raise BadRowError(f"the row has {max(map(len, ids))} tokens, more than max_length")
        cut = max(0, surplus)  # the same for all choices, which so keep the same prompt
        return Question(
            row_id, [tokens[cut:] for tokens in ids], start - cut, [len(text) for text in texts], index, cut > 0
        )

    def prompt(self, row_id: int, row: dict) -> Prompt:
        """What comes before the last response, with the generation prompt of the chat template; and that response."""
        row = rename_columns(row, self.encoder.options.columns)
        try:
            name = detect_format(set(row), self.encoder.options.columns)
        except UserError as error:
            raise BadRowError(str(error)) from error
        if row.get("tools") not in (None, "", "[]", []):
            raise BadRowError("the row has tools, which are not supported")
        if name == "tokens":
            ids, reference = self._prompt_of_tokens(row)
        else:
            prompt, reference = self._prompt_of_text(name, row)
            ids = self._checked(self.encoder.encode_prompt(prompt)[1])
        if not reference.strip():
            raise BadRowError("the response is empty")
        if self.extract(reference) is None:
            raise BadRowError("the response has nothing that the verifier can compare with")
        if not 0 < len(ids) <= self.longest_prompt:
            raise BadRowError(f"the prompt has {len(ids)} tokens; from 1 to {self.longest_prompt} are possible")
        return Prompt(row_id, ids, reference)

    def _prompt_of_text(self, name: str, row: dict) -> tuple[str | list[dict], str]:
        """(text or conversation up to the answer, reference)."""
        if name == "messages":
            return _split_chat(check_messages(row["messages"], "messages"))
        if name == "prompt_completion":
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) or isinstance(completion, str):
                return _text(row, "prompt"), _text(row, "completion")
            return _split_chat(check_messages(prompt, "prompt") + check_messages(completion, "completion"))
        instruction, reference = _text(row, "instruction"), _text(row, "output" if "output" in row else "response")
        extra = _text(row, "input") if row.get("input") is not None else ""
        if self.tokenizer.chat_template:
            content = f"{instruction}\n\n{extra}" if extra else instruction
            return [{"role": "user", "content": content}], reference
        template = ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT
        return template.format(instruction=instruction, input=extra), reference

    def _prompt_of_tokens(self, row: dict) -> tuple[list[int], str]:
        encoded = self.encoder.encode(row)
        if encoded.truncated:
            raise BadRowError("the row is longer than max_length, so its answer may be cut off")
        mask = encoded.response_mask
        stop = len(mask) - mask[::-1].index(True)
        start = max(i for i in range(stop) if not mask[i]) + 1
        reference = self.tokenizer.decode(encoded.input_ids[start:stop], skip_special_tokens=True)
        return encoded.input_ids[:start], reference

    def _continuations(self, prompt: str, choices: list[str]) -> tuple[int, list[list[int]]]:
        """(start, token ids of prompt and choice for every choice).

        The choices begin where the tokens of the first of them leave those of the prompt alone: all are predicted from
        the same tokens, whatever merges at the boundary.
        """
        stem = prompt.rstrip()
        blank = prompt[len(stem) :] or " "  # a blank belongs to the word behind it in most vocabularies
        ids = [self._tokenize(stem + (choice if choice[0].isspace() else blank + choice)) for choice in choices]
        start = max(1, min(len(commonprefix([self._tokenize(stem), tokens])) for tokens in ids))
        if min(map(len, ids)) <= start:
            raise BadRowError("a choice has no token of its own")
        return start, ids

    def _tokenize(self, text: str) -> list[int]:
        return self._checked(self.encoder.encode_prompt(text)[1])

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.encoder.vocab_size:
            raise BadRowError(f"token id {max(ids)} is not in the model's vocabulary of {self.encoder.vocab_size}")
        return ids


def _split_chat(messages: list[dict]) -> tuple[list[dict], str]:
    """(the conversation before the last assistant turn, what that says)."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if not last:
        raise BadRowError("the conversation has no assistant turn after a first message")
    return messages[:last], messages[last]["content"]


def check_columns(kind: str, row: dict, renamed: dict[str, str], path: str) -> None:
    """Whether the columns of a file's first row can be used for loss, choices or answers. Raises UserError."""
    row = rename_columns(row, renamed)
    if kind == "choices":
        if not all(_first_of(row, names) for names in (QUERY, CHOICES, ANSWER)):
            raise UserError(f"{path}: {missing_columns(set(row))}")
    elif kind == "answers" or not _is_text_row(row, renamed):
        try:
            detect_format(set(row), renamed)
        except UserError as error:
            more = "; for --loss also text" if kind == "loss" else ""
            raise UserError(f"{path}: {str(error).rstrip('.')}{more}.") from error


def missing_columns(columns: set[str]) -> str:
    """What is missing for a multiple-choice question."""
    found = ", ".join(sorted(columns)) or "none"
    wanted = "; ".join(" or ".join(names) for names in (QUERY, CHOICES, ANSWER))
    return f"The columns do not form a multiple-choice question: found {found}; needed are {wanted}."


def answer_index(answer: Any, labels: list[str] | None, count: int) -> int:
    """The right choice's index from 0: that of its label, or without labels a number from 0 or a letter from A.

    A whole number is a label only where one of the labels is a number, too: beside letters it counts from 0.
    """
    index = None
    if isinstance(answer, int | str) and not isinstance(answer, bool):
        name = str(answer).strip()
        if labels and (isinstance(answer, str) or any(label.isdecimal() for label in labels)):
            index = labels.index(name) if name in labels else None
        elif re.fullmatch("[0-9]+", name):
            index = int(name)
        elif re.fullmatch("[A-Za-z]", name):
            index = ord(name.upper()) - ord("A")
    if index is None or not 0 <= index < count:
        raise BadRowError(f"the answer {answer!r} is none of the {count} choices")
    return index


def final_number(text: str) -> Decimal | None:
    """The number right behind the first #### that has one, else the last number of the text; None where there is none.

    The first: a model that goes on after its answer poses questions of its own.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = MARKED_NUMBER.search(text)
    found = [marked[1]] if marked else ANY_NUMBER.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def plain_text(text: str) -> str:
    """The text with single blanks for whitespace."""
    return " ".join(text.split())


# What of an answer has to agree with the reference; None: nothing was found.
VERIFIERS: dict[str, Callable[[str], object]] = {"number": final_number, "exact": plain_text}


def _is_text_row(row: dict, renamed: dict[str, str]) -> bool:
    """Whether only `text` says what the row is, or the user named it so."""
    if "text" not in row or "text" in renamed:
        return "text" in row
    try:
        detect_format(set(row), renamed)
    except UserError:
        return True
    return False


def _first_of(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of the columns that has a value, else the first that is there."""
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def _choice_prompt(row: dict, query: str) -> str:
    """What the choices of a question follow. `query`: the first of QUERY that has a value."""
    text = _text(row, query)
    if query == "query" or row.get("question") is None:
        if not text.strip():
            raise BadRowError(f"{query} is empty")
        return text
    question = _text(row, "question").strip()
    if not question:
        raise BadRowError("question is empty")
    asked = f"Question: {question}\nAnswer:"
    passage = "" if query == "question" else text.strip()  # some data sets have a passage for some questions alone
    return f"{passage}\n{asked}" if passage else asked


def _choice_texts(value: Any) -> tuple[list[str], list[str] | None]:
    """(texts, their labels where the row has them)."""
    labels = None
    if isinstance(value, dict):
        labels, value = value.get("label"), value.get("text")
    if not isinstance(value, list) or len(value) < 2:
        raise BadRowError("the choices are not a list of two texts or more")
    if not all(isinstance(text, str) and text.strip() for text in value):
        raise BadRowError("a choice is empty or not text")
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(value)):
        raise BadRowError("the choices have other labels than texts")
    return value, None if labels is None else [str(label) for label in labels]


def _text(row: dict, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRowError(f"{column} is {'missing (null)' if value is None else f'a {type(value).__name__}'}, not text")
    return value
