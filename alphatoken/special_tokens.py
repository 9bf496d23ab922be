"""Special tokens, such as <|im_end|>, that users wrote in the text of their rows.

Tokenizers make control tokens of them. To read them as plain text instead: they are hidden from the chat template; the
special tokens in what it makes are then its own and become placeholders; and a copy of the tokenizer knows those
placeholders as it knew the special tokens, and no special token else. So everything around them is tokenised as ever.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from alphatoken.chat import THINK_TAG, Rendered, Span
from alphatoken.errors import BadRowError

# Private use, as in chat.py, with the token's id inside
HIDDEN = "\ue0f2{}\ue0f3"  # what a user wrote
PLACEHOLDER = "\ue0f4{}\ue0f5"  # the template's own
RESERVED = re.compile("[\ue0f0-\ue0f5]")


class SpecialTokens:
    """A tokenizer's special tokens in text that users wrote.

    Reasoning tags never count: templates look for them in the content, so whoever types one means it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._added = {
            token.content: (token_id, token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content
        }
        self._any = _any_of(self._added)
        self._typed = _any_of(content for content in self._added if not re.fullmatch(THINK_TAG, content))

    def find(self, texts: Iterable[str]) -> str | None:
        """The first special token in the texts."""
        found = (self._typed.search(text) for text in texts) if self._typed else ()
        return next((match[0] for match in found if match), None)

    def hide(self, text: str) -> str:
        """The text with a mark for every special token in it. Raises BadRowError where it has such marks itself."""
        if found := RESERVED.search(text):
            raise BadRowError(f"the text contains the private-use character U+{ord(found[0]):04X}")
        return self._typed.sub(lambda match: HIDDEN.format(self._added[match[0]][0]), text) if self._typed else text

    def hide_in(self, messages: list[dict]) -> list[dict]:
        """The messages with their texts so."""
        return [{k: self.hide(v) if isinstance(v, str) else v for k, v in message.items()} for message in messages]

    def reveal(self, text: str, spans: Sequence[Span] = ()) -> Rendered:
        """What `encode` takes: special tokens become placeholders, then hidden ones what the user typed."""
        result, places = "", [0]
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):  # no token lies across the edge of a response
            piece = text[start:stop]
            if self._any:
                piece = self._any.sub(lambda match: PLACEHOLDER.format(self._added[match[0]][0]), piece)
            result += re.sub(HIDDEN.format("([0-9]+)"), lambda match: self._content(int(match[1])), piece)
            places.append(len(result))
        return Rendered(result, list(zip(places[1:-1:2], places[2:-1:2], strict=True)))

    def readable(self, text: str) -> str:
        """`text` of `reveal` with the special tokens themselves."""
        return re.sub(PLACEHOLDER.format("([0-9]+)"), lambda match: self._content(int(match[1])), text)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """(ids, offsets) of a text by `reveal`. Raises BadRowError where the tokenizer has no plain tokens for it."""
        backend, id_of = self._plain_tokenizer
        found = backend.encode(text, add_special_tokens=add_special_tokens)
        plain = {token_id: content for content, (token_id, _) in self._added.items()}
        plain.pop(self.tokenizer.unk_token_id, None)  # stands for any character that the vocabulary lacks
        for token_id, is_added in zip(found.ids, found.special_tokens_mask, strict=True):
            if token_id in plain and not is_added:
                raise BadRowError(f"the tokenizer cannot write {plain[token_id]} as plain text")
        return [id_of.get(token_id, token_id) for token_id in found.ids], found.offsets

    @cached_property
    def _plain_tokenizer(self) -> tuple[Any, dict[int, int]]:
        """A copy that finds no special token in a text, but placeholders in the same way; and what their ids mean."""
        from tokenizers import AddedToken, Tokenizer

        backend: Any = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        names = {PLACEHOLDER.format(token_id): token for token_id, token in self._added.values()}
        backend.add_tokens(
            [
                AddedToken(name, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized)
                for name, t in names.items()
            ]
        )
        backend.encode_special_tokens = True  # as plain text; what is not special is still found
        ids = {backend.token_to_id(PLACEHOLDER.format(token_id)): token_id for token_id, _ in self._added.values()}
        return backend, ids

    def _content(self, token_id: int) -> str:
        return self.tokenizer.added_tokens_decoder[token_id].content


def _any_of(contents: Iterable[str]) -> re.Pattern | None:
    """The longest first, as tokenizers find them."""
    found = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None
