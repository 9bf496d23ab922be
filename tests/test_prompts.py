"""Rows of every format to prompts and answers."""

import pytest
from tiny_tokenizers import CHATML, byte_level

from alphatoken.config import DataOptions
from alphatoken.encode import Encoder
from alphatoken.errors import BadRowError, UserError
from alphatoken.prompts import PromptReader

USER = {"role": "user", "content": "What is two plus two?"}
CHAT = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"


def reader(template=CHATML, longest=200, chat=False, **columns) -> PromptReader:
    tokenizer = byte_level(template)
    return PromptReader(Encoder(tokenizer, DataOptions(columns=columns), len(tokenizer)), longest, chat)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "four"}]}, "four"),
        ({"messages": [USER]}, None),
        ({"messages": [USER], "answer": "4"}, "4"),
        ({"messages": [USER, {"role": "assistant", "content": "four"}], "answer": 4}, "4"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "four"}]}, "four"),
        ({"instruction": USER["content"], "input": "", "output": "four"}, "four"),
        ({"instruction": USER["content"]}, None),
    ],
)
def test_conversations(row, answer):
    found = reader().read(row)
    assert (found.prompt, found.messages, found.answer) == (CHAT, [USER], answer)
    assert byte_level(CHATML).decode(found.prompt_ids) == CHAT


def test_plain_text_and_renamed_columns():
    tokenizer = byte_level()
    found = reader(None).read({"prompt": "Two plus two is", "completion": " four"})
    assert (found.prompt, found.messages, found.answer) == ("Two plus two is", None, " four")
    assert found.prompt_ids == tokenizer("Two plus two is")["input_ids"]
    asked = reader(chat=True, prompt="question").read({"question": USER["content"], "answer": "4"})
    assert (asked.prompt, asked.messages, asked.answer) == (CHAT, [USER], "4")


@pytest.mark.parametrize("column", ["messages", "input_ids"])
def test_columns_that_the_user_chose_go_before_others(column):
    others = {"messages": [USER, {"role": "assistant", "content": "four"}], "input_ids": [20, 21], "labels": [-100, 21]}
    row = {"question": "One plus one?", "gold": "two", "answer": "5", column: others[column], "labels": [-100, 21]}
    found = reader(prompt="question", completion="gold").read(row)
    assert (found.prompt, found.answer) == ("One plus one?", "two")
    chat = {"messages": others["messages"], "gold": "two"}
    assert reader(completion="gold").read(chat).answer == "two"


def test_tokens():
    tokenizer = byte_level()
    ids = tokenizer("Two plus two is four")["input_ids"]
    found = reader(None).read({"input_ids": ids, "response_mask": [i >= len(ids) - 1 for i in range(len(ids))]})
    assert found.prompt_ids == ids[:-1] and found.answer == tokenizer.decode(ids[-1:])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "word " * 300}, "tokens; from 1 to 200 leave room"),
        ({"prompt": " "}, "empty"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": [{"role": "assistant", "content": "four"}]}, "no turn before the answer"),
        ({"prompt": None, "text": "x"}, "the row has no prompt"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "tools"),
        ({"instruction": 3}, "not text"),
    ],
)
def test_rows_that_cannot_be_used(row, reason):
    with pytest.raises(BadRowError, match=reason):
        reader().read(row)


@pytest.mark.parametrize("row", [{"prompt": "hello"}, {"messages": [USER]}, {"instruction": "hello"}])
def test_a_prompt_beyond_the_model_s_vocabulary(row):
    small = PromptReader(Encoder(byte_level(CHATML), DataOptions(), vocab_size=5), 200)
    with pytest.raises(BadRowError, match="is not in the model's vocabulary of 5"):
        small.read(row)


def test_a_conversation_without_a_chat_template():
    with pytest.raises(UserError, match="no chat template"):
        reader(None).read({"messages": [USER]})
