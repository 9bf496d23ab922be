import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny
from tokenizers import AddedToken

from alphatoken.errors import UserError
from alphatoken.schema import TOKEN_CLASSES
from alphatoken.token_classes import TOKEN_CLASS_NAMES, check_class_names, class_ids, token_class_table


@pytest.fixture
def tokenizer():
    tokenizer = tiny.byte_level(eos="</s>")
    tokenizer.add_tokens(["\n\n\n", " 42", "7", "don't", "):\n", " ½", AddedToken("<|tool|>", special=True)])
    return tokenizer


def by_token(tokenizer, table: pa.Table) -> dict[str, tuple[str, str]]:
    """token as the vocabulary spells it -> (text, class)."""
    rows = table.to_pylist()
    return {name: (rows[i]["text"], rows[i]["token_class"]) for name, i in tokenizer.get_vocab().items()}


def test_one_row_per_id_by_the_schema(tokenizer):
    table = token_class_table(tokenizer, [])
    assert table.schema == TOKEN_CLASSES
    assert table["token_id"].to_pylist() == list(range(len(tokenizer)))


def test_texts_and_classes():
    tokenizer = tiny.byte_level(eos="</s>")
    tokens = by_token(tokenizer, token_class_table(tokenizer, [tokenizer.convert_tokens_to_ids("<|stop|>")]))
    assert tokens["Ġanswer"] == (" answer", "words")
    assert tokens["a"] == ("a", "words")
    assert tokens["Ċ"] == ("\n", "whitespace")
    assert tokens["Ġ"] == (" ", "whitespace")
    assert tokens["7"] == ("7", "digits")
    assert tokens["?"] == ("?", "punctuation")
    assert tokens["_"] == ("_", "punctuation")
    assert tokens["ð"] == ("\N{REPLACEMENT CHARACTER}", "words")  # the first byte of an emoji
    assert tokens["<|im_start|>"] == ("<|im_start|>", "template")
    assert tokens["</think>"] == ("</think>", "template")
    for end in ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|stop|>"):
        assert tokens[end] == (end, "end-of-turn")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the", "words"),
        (" don't", "words"),
        ("x2", "words"),
        ("é", "words"),
        ("中", "words"),
        ("\N{REPLACEMENT CHARACTER}", "words"),
        ("2026", "digits"),
        (" 42", "digits"),
        ("٣", "digits"),
        ("):\n", "punctuation"),
        (" ...", "punctuation"),
        ("😀", "punctuation"),
        ("3.", "words"),
        ("  ", "whitespace"),
        ("\r\n\t", "whitespace"),
        ("\u3000\u00a0", "whitespace"),
    ],
)
def test_class_of_a_text(text, expected):
    from alphatoken.token_classes import _classes_by_text

    assert TOKEN_CLASS_NAMES[_classes_by_text(pa.array([text]))[0]] == expected


def test_added_tokens_are_template_but_added_blanks_are_not(tokenizer):
    tokens = by_token(tokenizer, token_class_table(tokenizer, []))
    assert tokens["\n\n\n"] == ("\n\n\n", "whitespace")
    assert tokens["<|tool|>"][1] == "template"
    assert tokens["don't"][1] == "template"


def test_eos_ids_decide_about_endoftext():
    tokenizer = tiny.byte_level(eos="<|im_end|>")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert by_token(tokenizer, token_class_table(tokenizer, []))["<|endoftext|>"][1] == "template"
    assert by_token(tokenizer, token_class_table(tokenizer, [token_id]))["<|endoftext|>"][1] == "end-of-turn"


def test_sentencepiece_blanks_are_kept():
    tokenizer = tiny.sentencepiece()
    tokens = by_token(tokenizer, token_class_table(tokenizer, []))
    assert all(not name.startswith("▁") or text.startswith(" ") for name, (text, _) in tokens.items())
    assert tokens["a"] == ("a", "words")
    assert tokens["<0xE2>"] == ("\N{REPLACEMENT CHARACTER}", "words")
    assert tokens["<0x0A>"] == ("\n", "whitespace")
    assert tokens["</s>"][1] == "end-of-turn"


def test_padding_ids_of_the_model():
    tokenizer = tiny.byte_level()
    table = token_class_table(tokenizer, [], vocab_size=len(tokenizer) + 3)
    assert table.num_rows == len(tokenizer) + 3
    assert table.slice(len(tokenizer)).to_pylist()[0] == {
        "token_id": len(tokenizer),
        "text": "",
        "token_class": "template",
    }


def test_class_ids_are_by_token_id_whatever_the_order_of_the_file(tokenizer):
    table = token_class_table(tokenizer, [])
    expected = [TOKEN_CLASS_NAMES.index(name) for name in table["token_class"].to_pylist()]
    file = io.BytesIO()
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    classes = shuffled["token_class"].cast(pa.string()).dictionary_encode()  # another order of the dictionary
    pq.write_table(shuffled.set_column(2, "token_class", classes), file)
    ids = class_ids(pq.read_table(file))
    assert ids.dtype == np.int8
    assert ids.tolist() == expected
    assert len(set(expected)) == len(TOKEN_CLASS_NAMES)


def test_class_names_are_checked():
    check_class_names(TOKEN_CLASS_NAMES)
    with pytest.raises(UserError, match="wrods: no such token class; choose from end-of-turn, template"):
        check_class_names(["digits", "wrods"])


def test_slow_tokenizers_are_refused():
    class SlowTokenizer:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(UserError, match="old/model"):
        token_class_table(SlowTokenizer(), [])
