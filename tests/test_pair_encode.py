"""TRL's preference formats to token ids of prompt, chosen and rejected."""

import pytest
from tiny_tokenizers import CHATML, QWEN3, byte_level, sentencepiece

from alphatoken.config import DataOptions
from alphatoken.encode import Encoder
from alphatoken.errors import BadRowError, UserError
from alphatoken.pair_encode import PairEncoder, is_pair, is_pair_data
from alphatoken.sources import plan_units

USER = {"role": "user", "content": "What is two plus two?"}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def encoder(template: str | None = CHATML, tokenizer=None, **options) -> PairEncoder:
    tokenizer = tokenizer or byte_level(template)
    return PairEncoder(Encoder(tokenizer, DataOptions(**options), len(tokenizer)))


def texts(pairs: PairEncoder, row: dict) -> tuple[str, str, str]:
    pair, decode = pairs.encode(row), pairs.encoder.tokenizer.decode
    return decode(pair.prompt_ids), decode(pair.chosen_ids), decode(pair.rejected_ids)


CHAT = (
    "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n",
    "four<|im_end|>",
    "five, I am sure<|im_end|>",
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [assistant("four")], "rejected": [assistant("five, I am sure")]},
        {"prompt": [USER], "chosen": "four", "rejected": "five, I am sure"},
        {"chosen": [USER, assistant("four")], "rejected": [USER, assistant("five, I am sure")]},
        {
            "prompt": USER["content"],
            "chosen": [USER, assistant("four")],
            "rejected": [USER, assistant("five, I am sure")],
        },
        {"instruction": USER["content"], "chosen": "four", "rejected": "five, I am sure", "output": "x", "input": ""},
        {"prompt": "rendered", "messages": [USER], "chosen": "four", "rejected": "five, I am sure"},
    ],
    ids=["conversational", "text answers", "implicit", "prompt repeated", "alpaca", "of alphatoken pair"],
)
def test_conversational_formats(row):
    assert texts(encoder(), row) == CHAT


def test_a_template_that_adds_to_the_response():
    prompt, chosen, rejected = texts(encoder(QWEN3), {"prompt": [USER], "chosen": "four", "rejected": "five"})
    assert prompt.endswith("<|im_start|>assistant\n") and chosen.endswith("four<|im_end|>")
    assert rejected.endswith("five<|im_end|>")


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=True), sentencepiece()], ids=["bytes", "bos", "sp"])
def test_standard_format_is_the_same_tokens_as_one_text(tokenizer):
    pairs = encoder(tokenizer=tokenizer)
    pair = pairs.encode({"prompt": "The answer is", "chosen": " four", "rejected": " five."})
    end = tokenizer.eos_token
    assert pair.prompt_ids + pair.chosen_ids == tokenizer("The answer is four" + end)["input_ids"]
    assert pair.prompt_ids + pair.rejected_ids == tokenizer("The answer is five." + end)["input_ids"]
    assert tokenizer.decode(pair.prompt_ids, skip_special_tokens=True).strip() == "The answer is"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),  # TRL's example, cut at a word
        ("\n\nHuman: Hi\n\nAssistant: I go", "\n\nHuman: Hi\n\nAssistant: I stay", "\n\nHuman: Hi\n\nAssistant:"),
        ("Q: 2?\ntwo", "Q: 2?\nthree", "Q: 2?\n"),
    ],
)
def test_implicit_prompt_of_texts(chosen, rejected, prompt):
    found = texts(encoder(None), {"chosen": chosen, "rejected": rejected})
    assert found == (prompt, chosen[len(prompt) :] + "<|im_end|>", rejected[len(prompt) :] + "<|im_end|>")


def test_sampled_tokens_are_taken_as_they_are():
    row = {
        "prompt": byte_level(CHATML).decode([20, 21]),
        "chosen": "a",
        "rejected": "b",
        "prompt_ids": [20, 21],
        "chosen_ids": [22],
        "rejected_ids": [23],
    }
    for prompt in (row["prompt"], " " + row["prompt"] + "\n", None, [{"role": "user", "content": "x"}]):
        pair = encoder().encode(row | {"prompt": prompt})
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ([20, 21], [22], [23])
    with pytest.raises(BadRowError, match="not the row's prompt in this model's tokens: give pairs of another model's"):
        encoder().encode(row | {"prompt": "Two?"})


def test_truncation():
    row = {"prompt_ids": [20] * 4, "chosen_ids": [21, 22, 23], "rejected_ids": [21, 24]}
    pair = encoder(max_length=6).encode(row)
    assert (pair.chosen_ids, pair.rejected_ids, pair.truncated) == ([21, 22], [21, 24], True)
    for options, reason in (
        ({"max_length": 5}, "the same after truncation"),
        ({"max_length": 4}, "nothing of a response is left"),
        ({"max_length": 6, "too_long": "quarantine"}, "a row of 7 tokens"),
    ):
        with pytest.raises(BadRowError, match=reason):
            encoder(**options).encode(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a b", "chosen": "x", "rejected": "x"}, "the same"),
        ({"prompt": "a b", "chosen": "", "rejected": "x"}, "chosen: the response is empty"),
        ({"prompt": "a b", "chosen": "x", "rejected": None}, "rejected is neither"),
        ({"prompt": "a b", "chosen": "x", "rejected": [assistant("x")]}, "one of chosen and rejected is text"),
        ({"chosen": "x", "rejected": "y"}, "no common word"),
        ({"chosen": [assistant("x")], "rejected": [assistant("y")]}, "no common message"),
        ({"chosen": [USER, assistant("x")], "rejected": [USER, assistant("x")]}, "the same"),
        (
            {"prompt": [USER], "chosen": [assistant("x"), USER, assistant("z")], "rejected": "y"},
            "more than one assistant",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [assistant("y")]}, "chosen: "),
        ({"prompt_ids": [1], "chosen_ids": [10**6], "rejected_ids": [2]}, "not in the model's vocabulary"),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [2]}, "no tokens"),
        ({"prompt": "x", "chosen": "a"}, "no chosen and rejected"),
    ],
)
def test_rows_that_cannot_be_used(row, reason):
    with pytest.raises(BadRowError, match=reason):
        encoder().encode(row)


def test_which_columns_are_a_pair():
    assert is_pair({"prompt", "chosen", "rejected"}, {})
    assert is_pair({"good", "bad"}, {"chosen": "good", "rejected": "bad"})
    assert not is_pair({"chosen", "rejected"}, {"completion": "chosen"})
    assert is_pair({"prompt_ids", "chosen_ids", "rejected_ids"}, {})
    assert not is_pair({"messages"}, {})


def test_files_of_both_kinds_are_told_apart(tmp_path):
    """By their names: which of them comes first is nothing that a user sees."""
    pairs, rows = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    pairs.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    rows.write_text('{"prompt": "p", "completion": "c"}\n')
    assert is_pair_data("auto", plan_units([str(pairs)]), {})
    assert not is_pair_data("auto", plan_units([str(rows)]), {})
    assert is_pair_data("dpo", plan_units([str(rows)]), {})
    with pytest.raises(UserError, match=r"a.jsonl holds preference pairs, .*b.jsonl does not: run them apart"):
        is_pair_data("auto", plan_units([str(rows), str(pairs)]), {})
