"""Conversations to text, and where in that text the responses are.

A response begins where the generation prompt ends and includes the end-of-turn token that follows its content, but not
the newline behind that. Templates with `{% generation %}` marks say so themselves. For the others the content of the
assistant turns is located by rendering twice: once as given, once with every piece of content replaced by a marker.
Putting the content back must reproduce the first text exactly, so a template that alters content is noticed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from alphatoken.errors import BadRowError, UserError
from alphatoken.token_classes import END_OF_TURN_TOKENS

Span = tuple[int, int]  # characters start:stop

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Templates look for these in the content, move them and drop what they enclose, so they stay visible to them.
THINK_TAG = r"</?think>|\[/?THINK\]"
MARKER_START, MARKER_END = "\ue0f0", "\ue0f1"  # private use: no text has them
MARKER = re.compile(f"{MARKER_START}([0-9]+){MARKER_END}")


@dataclass(frozen=True)
class Rendered:
    """text: the conversation through the chat template. spans: its responses, in order, not overlapping."""

    text: str
    spans: list[Span]


class ChatRenderer:
    """A tokenizer's chat template. Raises UserError where there is none, or none that compiles."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = _chat_template(tokenizer)
        self.has_generation_marks = bool(GENERATION_MARK.search(self.template))
        ends = {*END_OF_TURN_TOKENS, tokenizer.eos_token, self._probe_end_of_turn()} - {None}
        any_end = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True))
        self._ending = re.compile(rf"(?:\s*(?:{THINK_TAG}))*(?:\s*(?:{any_end})+)?")

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises BadRowError where the template refuses it."""
        return self._render(messages, add_generation_prompt, False)[0]

    def render_responses(self, messages: list[dict], first_response: int = 0) -> Rendered:
        """The conversation and its responses: the assistant turns from message number `first_response` on.

        messages: as `check_messages` returns them. Raises BadRowError where the responses cannot be located.
        """
        turns = [i for i, m in enumerate(messages) if i >= first_response and m["role"] == "assistant"]
        if not turns:
            raise BadRowError("the conversation has no assistant turn to learn from")
        if self.has_generation_marks:
            return self._marked_responses(messages, turns)
        text = self.render(messages)
        spans: list[Span] = []
        for turn, (start, stop) in zip(turns, self._locate_contents(messages, turns, text), strict=True):
            start = min(start, self._prompt_end(messages[:turn], text, start))
            start = max(start, spans[-1][1]) if spans else start
            ending = self._ending.match(text, stop)
            spans.append((start, ending.end() if ending else stop))
        return Rendered(text, spans)

    def _render(self, messages: list[dict], add_generation_prompt: bool, marks: bool) -> tuple[str, list[Span]]:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateSyntaxError as error:
            name = self.tokenizer.name_or_path
            raise UserError(f"The chat template of {name} is not valid Jinja: {error}.") from error
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses the conversation: {error}") from error
        except Exception as error:  # templates call methods on whatever a message holds
            name = type(error).__name__
            raise BadRowError(f"the chat template refuses the conversation: {name}: {error}") from error
        return texts[0], spans[0] if marks else []

    def _marked_responses(self, messages: list[dict], turns: list[int]) -> Rendered:
        """By the template's own marks, without those of assistant turns that belong to the prompt."""
        text, spans = self._render(messages, False, True)
        if any(message["role"] == "assistant" for message in messages[: turns[0]]):
            prompt = self.render(messages[: turns[0]])
            if not text.startswith(prompt):
                raise BadRowError("the chat template renders the prompt differently when the response follows")
            spans = [span for span in spans if span[0] >= len(prompt)]
        return Rendered(text, [span for span in spans if span[1] > span[0]])

    def _prompt_end(self, prompt: list[dict], text: str, content_start: int) -> int:
        """Where the generation prompt ends in the text; content_start where the text does not start with the prompt."""
        if not prompt:
            return content_start
        with_generation_prompt = self.render(prompt, add_generation_prompt=True)
        if text.startswith(with_generation_prompt):
            return len(with_generation_prompt)
        # The generation prompt may open a think block that is absent here.
        if text.startswith(without := self.render(prompt)):
            return max(len(without), len(commonprefix([with_generation_prompt, text])))
        return content_start

    def _locate_contents(self, messages: list[dict], turns: list[int], text: str) -> list[Span]:
        """Where the content of each turn is in the text: from its first to its last piece that the template kept."""
        if MARKER_START in text:
            raise BadRowError(f"the text contains the private-use character U+{ord(MARKER_START):04X}")
        pieces: list[str] = []
        owners: list[int] = []  # the turn of each piece
        marked = list(messages)
        for turn in turns:
            content, new = _replace_pieces(messages[turn]["content"], len(pieces))
            marked[turn] = {**messages[turn], "content": content}
            pieces += new
            owners += [turn] * len(new)
        marked_text = self.render(marked)
        if MARKER.sub(lambda match: pieces[int(match[1])], marked_text) != text:
            raise BadRowError("the chat template changes the text of a response, so its tokens cannot be located")

        found: dict[int, list[Span]] = {turn: [] for turn in turns}
        shift, last = 0, -1  # shift: markers are longer or shorter than the pieces that they stand for
        for match in MARKER.finditer(marked_text):
            index, start = int(match[1]), match.start() + shift
            if index <= last:
                raise BadRowError("the chat template repeats or reorders the responses")
            found[owners[index]].append((start, start + len(pieces[index])))
            shift, last = shift + len(pieces[index]) - len(match[0]), index
        for turn, spans in found.items():
            if not spans:
                raise BadRowError(f"the chat template leaves out the text of messages[{turn}]")
        return [(spans[0][0], spans[-1][1]) for spans in found.values()]

    def _probe_end_of_turn(self) -> str | None:
        """The special token that the template puts behind the last assistant turn, if it is one token."""
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": MARKER_START}])
        except BadRowError:
            return None
        ending = text.rpartition(MARKER_START)[2].strip()
        specials = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return ending if ending in specials else None


def check_messages(value: Any, column: str) -> list[dict]:
    """Messages with a role and text, None values dropped. Raises BadRowError for anything else."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise BadRowError(f"{column} is not a list of messages with role and content")
    return [_check_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _check_message(message: Any, name: str) -> dict:
    if not isinstance(message, Mapping):
        raise BadRowError(f"{name} is not a message with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRowError(f"{name} has no role")
    if message.get("tool_calls") or role in ("tool", "function"):
        raise BadRowError(f"{name} is a tool call or its result, which is not supported")
    if content is None:
        raise BadRowError(f"{name} has no content")
    if not isinstance(content, str):
        raise BadRowError(f"{name} has content that is not text, such as images, which is not supported")
    if role == "assistant" and not content.strip():
        raise BadRowError(f"the response is empty: {name} has no text")
    # Arrow fills every key of every message; templates ask whether a key is there.
    return {key: value for key, value in message.items() if value is not None}


def _replace_pieces(content: str, first: int) -> tuple[str, list[str]]:
    """(content with a marker for every piece of text between think tags, the pieces). Blanks around them stay."""
    pieces: list[str] = []
    result = ""
    for part in re.split(f"({THINK_TAG})", content):
        core = part.strip()
        if core and not re.fullmatch(THINK_TAG, core):
            result += part.replace(core, f"{MARKER_START}{first + len(pieces)}{MARKER_END}", 1)
            pieces.append(core)
        else:
            result += part
    return result, pieces


def _chat_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct model, put a "
            "chat_template.jinja into the model's folder, or give prompt and completion as plain text."
        ) from error


def mask_spans(text: str, offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
    """(T,) whether a token starts inside a span. Leading blanks of a token do not count: in 'Answer: yes' the token
    ' yes' may begin with the prompt's last blank.
    """
    mask = []
    previous_stop = 0
    remaining = iter(spans)
    span = next(remaining, (len(text), len(text)))
    for start, stop in offsets:
        if start == stop:  # some tokenizers trim blanks from offsets: this token is all blank
            start = previous_stop
        token = text[start:stop]
        if not token.isspace():
            start += len(token) - len(token.lstrip())
        while start >= span[1] and span[1] < len(text):
            span = next(remaining, (len(text), len(text)))
        mask.append(span[0] <= start < span[1])
        previous_stop = max(previous_stop, stop)
    return mask
