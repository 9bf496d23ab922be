import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny

from alphatoken.chat import ChatRenderer
from alphatoken.config import DataOptions
from alphatoken.encode import Encoder, check_source, detect_format
from alphatoken.errors import BadRowError, UserError
from alphatoken.sources import plan_units

USER = {"role": "user", "content": "What is two plus two?"}
HELLO = {"role": "user", "content": "Hello there"}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def encoder(tokenizer, **options) -> Encoder:
    return Encoder(tokenizer, DataOptions(**options), len(tokenizer))


def responses(tokenizer, row: dict, **options) -> list[str]:
    """The text of every run of response tokens."""
    encoded = encoder(tokenizer, **options).encode(row)
    assert len(encoded.input_ids) == len(encoded.response_mask)
    runs: list[list[int]] = []
    previous = False
    for token_id, is_response in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if is_response:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token_id)
        previous = is_response
    return [tokenizer.decode(run) for run in runs]


def bad_row(tokenizer, row: dict, **options) -> str:
    with pytest.raises(BadRowError) as error:
        encoder(tokenizer, **options).encode(row)
    return str(error.value)


# Chat templates

MULTI_TURN = [HELLO, assistant("Hello there"), USER, assistant("four")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.CHATML, ["Hello there<|im_end|>", "four<|im_end|>"]),
        (tiny.LLAMA3, ["Hello there<|eot_id|>", "four<|eot_id|>"]),
        (tiny.GEMMA, ["Hello there<end_of_turn>", "four<end_of_turn>"]),
        (tiny.MISTRAL, [" Hello there</s>", " four</s>"]),
        (tiny.QWEN3, ["Hello there<|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"]),
        (tiny.THINKING_PROMPT, ["Hello there<|im_end|>", "four<|im_end|>"]),
        (tiny.MARKED, ["Hello there<|im_end|>", "four<|im_end|>"]),
    ],
    ids=["chatml", "llama3", "gemma", "mistral", "qwen3", "thinking-prompt", "generation-marks"],
)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_every_assistant_turn_of_messages_is_response(template, expected, trim_offsets):
    tokenizer = tiny.byte_level(template, trim_offsets=trim_offsets)
    assert responses(tokenizer, {"messages": MULTI_TURN}) == expected


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAMA3, tiny.GEMMA, tiny.QWEN3, tiny.MARKED, tiny.MISTRAL])
def test_tokens_are_those_of_the_chat_template(template):
    tokenizer = tiny.byte_level(template)
    encoded = encoder(tokenizer).encode({"messages": MULTI_TURN})
    assert encoded.input_ids == tokenizer.apply_chat_template(MULTI_TURN, return_dict=False)
    assert not encoded.truncated


def test_a_derived_mask_equals_the_one_of_generation_marks():
    row = {"messages": [HELLO, assistant(" Hello\n\nthere\n"), USER, assistant("😀 four")]}
    derived = encoder(tiny.byte_level(tiny.CHATML)).encode(row)
    marked = encoder(tiny.byte_level(tiny.MARKED)).encode(row)
    assert derived == marked


def test_an_answer_that_also_stands_in_the_question_and_the_header_is_found_in_its_place():
    row = {"messages": [{"role": "user", "content": "assistant"}, assistant("assistant")]}
    for template in (tiny.CHATML, tiny.LLAMA3, tiny.QWEN3.replace("'<think>", "'assistant<think>")):
        run = responses(tiny.byte_level(template), row)
        assert len(run) == 1
        assert run[0].endswith(("assistant<|im_end|>", "assistant<|eot_id|>"))
    assert responses(tiny.byte_level(tiny.CHATML), row) == ["assistant<|im_end|>"]


def test_template_that_strips_content():
    row = {"messages": [USER, assistant("\n\n four \n")]}
    assert responses(tiny.byte_level(tiny.GEMMA), row) == ["four<end_of_turn>"]
    assert responses(tiny.byte_level(tiny.LLAMA3, trim_offsets=True), row) == ["four<|eot_id|>"]


def test_blank_token_before_the_response_whose_offsets_are_trimmed_away():
    template = tiny.CHATML.replace("m['role'] + '\\n'", "m['role'] + ': '").replace("assistant\\n", "assistant: ")
    row = {"messages": [USER, assistant("\nfour")]}
    for trim_offsets in (False, True):
        assert responses(tiny.byte_level(template, trim_offsets=trim_offsets), row) == ["\nfour<|im_end|>"]


def test_think_blocks_of_earlier_turns_are_dropped_and_the_last_one_is_response():
    thought = "<think>two plus two</think>four"  # the template rewrites its line breaks
    row = {"messages": [USER, assistant(thought), HELLO, assistant(thought)]}
    expected = ["four<|im_end|>", "<think>\ntwo plus two\n</think>\n\nfour<|im_end|>"]
    assert responses(tiny.byte_level(tiny.QWEN3), row) == expected


def test_generation_prompt_that_opens_the_think_block_is_prompt():
    row = {"messages": [USER, assistant("<think>\ntwo plus two\n</think>\n\nfour")]}
    expected = ["two plus two\n</think>\n\nfour<|im_end|>"]
    assert responses(tiny.byte_level(tiny.THINKING_PROMPT), row) == expected


def test_system_message_that_moves_to_the_last_turn():
    row = {"messages": [{"role": "system", "content": "You are four"}, *MULTI_TURN]}
    assert responses(tiny.byte_level(tiny.MISTRAL), row) == [" Hello there</s>", " four</s>"]


def test_first_response_token_of_a_sentencepiece_tokenizer():
    tokenizer = tiny.sentencepiece(tiny.MISTRAL)
    encoded = encoder(tokenizer).encode({"messages": MULTI_TURN})
    first = encoded.response_mask.index(True)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[first - 1]) == "[/INST]"
    # The normaliser puts one more blank behind a special token; the decoder strips one.
    assert responses(tokenizer, {"messages": MULTI_TURN}) == [" Hello there</s>", " four</s>"]


def test_end_of_turn_token_of_an_unknown_name_is_learned_from_the_template():
    tokenizer = tiny.byte_level(tiny.CHATML.replace("<|im_end|>", "<|stop|>"), eos="</s>")
    assert responses(tokenizer, {"messages": MULTI_TURN}) == ["Hello there<|stop|>", "four<|stop|>"]


def test_template_without_end_of_turn_token():
    tokenizer = tiny.byte_level(tiny.CHATML.replace("<|im_end|>", ""))
    assert responses(tokenizer, {"messages": MULTI_TURN}) == ["Hello there", "four"]


def test_single_turn_that_begins_with_the_assistant():
    row = {"messages": [assistant("Hello there"), USER]}
    assert responses(tiny.byte_level(tiny.CHATML), row) == ["Hello there<|im_end|>"]


def test_null_keys_that_arrow_adds_are_not_shown_to_the_template():
    template = tiny.CHATML.replace("m['content']", "m['content'] + ('NAMED' if 'name' in m else '')")
    row = {"messages": [{**USER, "name": None}, {**assistant("four"), "name": None, "tool_calls": None}]}
    assert responses(tiny.byte_level(template), row) == ["four<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (tiny.CHATML.replace("m['content']", "m['content'] | upper"), "changes the text of a response"),
        (tiny.CHATML.replace("m['content']", "m['content'] + m['content']"), "repeats or reorders"),
        (tiny.CHATML.replace("m['content']", "''"), "leaves out the text of messages[1]"),
        (tiny.CHATML.replace("m['content']", "m['content'].missing.attribute"), "refuses the conversation"),
        (tiny.MARKED.replace("m['content'] + '<|im_end|>' }}{% endgen", "'' }}{% endgen"), "the response is empty"),
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}", "every token is response"),
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}four", "the first token is response"),
    ],
)
def test_templates_whose_responses_cannot_be_told_apart(template, reason):
    assert reason in bad_row(tiny.byte_level(template), {"messages": [USER, assistant("four")]})


def test_template_that_refuses_a_role():
    row = {"messages": [{"role": "system", "content": "You are helpful"}, USER, assistant("four")]}
    assert "System role not supported" in bad_row(tiny.byte_level(tiny.GEMMA), row)


def test_private_use_markers_in_the_text_are_refused():
    assert "U+E0F0" in bad_row(tiny.byte_level(tiny.CHATML), {"messages": [USER, assistant("a\ue0f00\ue0f1")]})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is not a list"),
        ([], "messages is not a list"),
        ("Hello", "messages is not a list"),
        (["Hello"], "messages[0] is not a message"),
        ([USER], "no assistant turn"),
        ([USER, assistant(" \n")], "the response is empty: messages[1] has no text"),
        ([USER, {"role": "assistant"}], "messages[1] has no content"),
        ([USER, {"content": "four"}], "messages[1] has no role"),
        ([USER, {"role": "assistant", "content": None}], "messages[1] has no content"),
        ([USER, {**assistant("four"), "tool_calls": [{"name": "add"}]}], "messages[1] is a tool call"),
        ([USER, {"role": "tool", "content": "4"}, assistant("four")], "messages[1] is a tool call or its result"),
        ([{"role": "user", "content": [{"type": "image"}]}, assistant("four")], "messages[0] has content that is not"),
    ],
)
def test_bad_messages(messages, reason):
    assert reason in bad_row(tiny.byte_level(tiny.CHATML), {"messages": messages})


def test_tools_are_refused():
    row = {"messages": [USER, assistant("four")], "tools": [{"name": "add"}]}
    assert "tools" in bad_row(tiny.byte_level(tiny.CHATML), row)


def test_no_chat_template_stops_the_job():
    with pytest.raises(UserError, match="tiny/byte-level has no chat template.*chat_template.jinja"):
        encoder(tiny.byte_level()).encode({"messages": [USER, assistant("four")]})


def test_template_that_is_not_jinja_stops_the_job():
    with pytest.raises(UserError, match="not valid Jinja"):
        ChatRenderer(tiny.byte_level("{% for m in messages %}"))


# prompt + completion


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED, tiny.QWEN3])
def test_conversational_completion_leaves_assistant_turns_of_the_prompt_alone(template):
    row = {"prompt": [HELLO, assistant("Hello there"), USER], "completion": [assistant("four"), USER, assistant("4")]}
    runs = responses(tiny.byte_level(template), row)
    assert [run.removeprefix("<think>\n\n</think>\n\n") for run in runs] == ["four<|im_end|>", "4<|im_end|>"]


def test_completion_may_be_one_message():
    assert responses(tiny.byte_level(tiny.CHATML), {"prompt": [USER], "completion": assistant("four")}) == [
        "four<|im_end|>"
    ]


def test_completion_without_assistant_turn():
    assert "no assistant turn" in bad_row(
        tiny.byte_level(tiny.CHATML), {"prompt": [assistant("a")], "completion": USER}
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("What is two plus two?", " The answer is four", " The answer is four<|im_end|>"),
        ("Answer: ", "four", " four<|im_end|>"),  # the prompt's last blank is part of the first response token
        ("Answer:", " four<|im_end|>", " four<|im_end|>"),  # has its EOS already
    ],
)
def test_text_prompt_and_completion_verbatim_with_eos(bos, prompt, completion, expected):
    tokenizer = tiny.byte_level(tiny.CHATML, bos=bos)
    row = {"prompt": prompt, "completion": completion}
    assert responses(tokenizer, row) == [expected]
    text = tokenizer.decode(encoder(tokenizer).encode(row).input_ids)
    assert text == ("<s>" if bos else "") + prompt + completion.removesuffix("<|im_end|>") + "<|im_end|>"


def test_text_without_eos_token():
    row = {"prompt": "Answer:", "completion": " four"}
    assert responses(tiny.byte_level(eos=None), row) == [" four"]


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("Answer:", "", "the response is empty"),
        ("Answer:", " \n", "the response is empty"),
        ("", "four", "every token is response"),
        ("Answer:", None, "completion is missing (null), not text"),
        (None, "four", "prompt is missing (null), not text"),
        ("Answer:", 4, "completion is a int, not text"),
        ("Answer:", [{"role": "assistant", "content": "four"}], "completion is a list, not text"),
        (None, None, "prompt is not a list of messages"),
    ],
)
def test_bad_prompt_or_completion(prompt, completion, reason):
    assert reason in bad_row(tiny.byte_level(tiny.CHATML), {"prompt": prompt, "completion": completion})


# Alpaca


def test_alpaca_goes_through_the_chat_template():
    tokenizer = tiny.byte_level(tiny.CHATML)
    row = {"instruction": "What is", "input": "two plus two?", "output": "four"}
    assert responses(tokenizer, row) == ["four<|im_end|>"]
    text = tokenizer.decode(encoder(tokenizer).encode(row).input_ids)
    assert text == "<|im_start|>user\nWhat is\n\ntwo plus two?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}, {"input": "two plus {two}?"}])
def test_alpaca_without_chat_template(extra):
    tokenizer = tiny.byte_level()
    row = {"instruction": "What is {this}", **extra, "response": "four"}
    assert responses(tokenizer, row) == ["four<|im_end|>"]
    text = tokenizer.decode(encoder(tokenizer).encode(row).input_ids)
    assert "### Instruction:\nWhat is {this}\n\n" in text
    assert ("### Input:\ntwo plus {two}?\n\n### Response:\nfour" in text) == bool(extra.get("input"))
    assert text.endswith("\n\n### Response:\nfour<|im_end|>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "output": "four"}, "instruction is missing"),
        ({"instruction": "Add", "output": None}, "output is missing"),
        ({"instruction": "Add", "output": " "}, "the response is empty"),
        ({"instruction": "Add", "input": 3, "output": "four"}, "input is a int"),
    ],
)
@pytest.mark.parametrize("template", [tiny.CHATML, None])
def test_bad_alpaca_rows(row, reason, template):
    assert reason in bad_row(tiny.byte_level(template), row)


# Already tokenised


@pytest.mark.parametrize(
    "columns",
    [
        {"response_mask": [False, True, True]},
        {"response_mask": [0, 1, 1]},
        {"labels": [-100, 6, 7]},
        {"response_mask": [False, True, True], "labels": [-100, -100, 7]},  # labels of a masked data set
        {"response_mask": np.array([False, True, True]), "input_ids": np.array([5, 6, 7])},
    ],
)
def test_tokenised_rows_are_used_as_they_are(columns):
    encoded = encoder(tiny.byte_level()).encode({"input_ids": [5, 6, 7], **columns})
    assert (encoded.input_ids, encoded.response_mask) == ([5, 6, 7], [False, True, True])
    assert all(type(value) is bool for value in encoded.response_mask)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"labels": [6, 7, -100]}, "labels[0] is 6"),
        ({"labels": [-100, 6]}, "input_ids has 3 entries, labels has 2"),
        ({"labels": None}, "labels is missing (null)"),
        ({"labels": "text"}, "labels is a str"),
        ({"labels": [-100, 6.0, 7]}, "labels has entries that are not whole numbers"),
        ({"labels": [-100, -100, -100]}, "the response is empty"),
        ({"labels": [5, -100, 7]}, "the first token is response"),
        ({"labels": [5, 6, 7]}, "every token is response"),
        ({"response_mask": [0, 1, 2]}, "other values than true and false"),
        ({"input_ids": [], "labels": []}, "the row has no tokens"),
        ({"input_ids": [5, -1, 7], "response_mask": [0, 1, 1]}, "token id -1 is not in the model's vocabulary"),
        ({"input_ids": [5, 6, 10**6], "response_mask": [0, 1, 1]}, "token id 1000000 is not in"),
    ],
)
def test_bad_tokenised_rows(columns, reason):
    assert reason in bad_row(tiny.byte_level(), {"input_ids": [5, 6, 7], **columns})


def test_text_with_ids_beyond_the_models_vocabulary():
    tokenizer = tiny.byte_level(tiny.CHATML)
    with pytest.raises(BadRowError, match="vocabulary of 20"):
        Encoder(tokenizer, DataOptions(), 20).encode({"messages": MULTI_TURN})


# Length


def test_truncation_keeps_the_start():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    encoded = encoder(tiny.byte_level(), max_length=3).encode(row)
    assert (encoded.input_ids, encoded.response_mask, encoded.truncated) == ([5, 6, 7], [False, True, True], True)
    assert not encoder(tiny.byte_level(), max_length=4).encode(row).truncated


def test_long_rows_can_be_quarantined():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}
    reason = bad_row(tiny.byte_level(), row, max_length=3, too_long="quarantine")
    assert reason == "the row has 4 tokens, more than max_length 3"


def test_truncation_that_leaves_no_response():
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
    reason = bad_row(tiny.byte_level(), row, max_length=3)
    assert "starts at token 3 of 4, beyond max_length 3" in reason


# Formats and columns


@pytest.mark.parametrize(
    ("columns", "renamed", "expected"),
    [
        ({"messages", "prompt"}, (), "messages"),
        ({"prompt", "completion", "id"}, (), "prompt_completion"),
        ({"messages", "prompt", "completion"}, (), "messages"),
        ({"messages", "prompt", "completion"}, ("prompt",), "prompt_completion"),
        ({"instruction", "input", "output"}, (), "alpaca"),
        ({"instruction", "response"}, (), "alpaca"),
        ({"input_ids", "labels", "messages"}, (), "tokens"),
        ({"input_ids", "attention_mask", "messages"}, (), "messages"),
    ],
)
def test_detect_format(columns, renamed, expected):
    assert detect_format(columns, renamed) == expected


def test_unknown_format_names_columns_found_and_accepted():
    with pytest.raises(UserError, match="found chosen, rejected; accepted are messages; prompt"):
        detect_format({"rejected", "chosen"})
    assert "found prompt;" in bad_row(tiny.byte_level(), {"prompt": "Answer:"})


def test_columns_are_renamed():
    row = {"question": "Answer:", "answer": " four", "prompt": "not this"}
    columns = {"prompt": "question", "completion": "answer"}
    assert responses(tiny.byte_level(), row, columns=columns) == [" four<|im_end|>"]


def write(tmp_path, name: str, text: str) -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_check_source_looks_at_every_file(tmp_path):
    good = write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}')
    bad = write(tmp_path, "b.jsonl", '{"text": "a"}')
    check_source(plan_units([good]), DataOptions(), tiny.byte_level())
    with pytest.raises(UserError, match=r"b.jsonl: .*found text"):
        check_source(plan_units([good, bad]), DataOptions(), tiny.byte_level())


@pytest.mark.parametrize(
    ("line", "needs_template"),
    [
        ('{"messages": []}', True),
        ('{"prompt": [], "completion": []}', True),
        ('{"prompt": "a", "completion": "b"}', False),
        ('{"instruction": "a", "output": "b"}', False),
        ('{"input_ids": [1], "labels": [1]}', False),
    ],
)
def test_check_source_wants_a_chat_template_where_one_is_needed(tmp_path, line, needs_template):
    units = plan_units([write(tmp_path, "a.jsonl", line)])
    check_source(units, DataOptions(), tiny.byte_level(tiny.CHATML))
    if needs_template:
        with pytest.raises(UserError, match="no chat template"):
            check_source(units, DataOptions(), tiny.byte_level())
    else:
        check_source(units, DataOptions(), tiny.byte_level())


def test_check_source_checks_the_renaming(tmp_path):
    units = plan_units([write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b"}')])
    with pytest.raises(UserError, match="has no column answer"):
        check_source(units, DataOptions(columns={"completion": "answer"}), tiny.byte_level())
    with pytest.raises(UserError, match="--columns promt: no such column"):
        check_source(units, DataOptions(columns={"promt": "prompt"}), tiny.byte_level())


def test_slow_tokenizers_are_refused():
    class SlowTokenizer:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(UserError, match="old/model has no fast version"):
        Encoder(SlowTokenizer(), DataOptions(), 10)
    with pytest.raises(UserError, match="old/model has no fast version"):
        check_source([], DataOptions(), SlowTokenizer())


# Special tokens in the text of users

TEMPLATES = [tiny.CHATML, tiny.LLAMA3, tiny.GEMMA, tiny.QWEN3, tiny.MARKED, tiny.MISTRAL, tiny.THINKING_PROMPT]
TOKENIZERS = {
    "byte-level": tiny.byte_level,
    "trimmed": lambda template=None: tiny.byte_level(template, trim_offsets=True),
    "bos": lambda template=None: tiny.byte_level(template, bos=True),
    "sentencepiece": tiny.sentencepiece,
}
TYPED = "Say <|im_end|> or <s>[INST]</s><end_of_turn>\n<|eot_id|>?"


def special_ids(tokenizer, ids) -> list[int]:
    specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    return [i for i in ids if i in specials]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_special_tokens_that_users_typed_can_be_plain_text(make, template):
    """The template's own stay special; the responses hold what was typed, and decode to it."""
    tokenizer = make(template)
    typed = [{**HELLO, "content": TYPED}, assistant(f"Hello {TYPED}"), USER, assistant(f"{TYPED} four")]
    row, plain = {"messages": typed}, {"messages": [HELLO, assistant("Hello there"), USER, assistant("four")]}
    literal = encoder(tokenizer, special_tokens_in_text="literal").encode(row)
    expected = encoder(tokenizer).encode(plain)
    assert special_ids(tokenizer, literal.input_ids) == special_ids(tokenizer, expected.input_ids)
    assert tokenizer.decode(literal.input_ids).count(TYPED) == 3
    ours = responses(tokenizer, row, special_tokens_in_text="literal")
    for run, usual, content in zip(ours, responses(tokenizer, plain), (f"Hello {TYPED}", f"{TYPED} four"), strict=True):
        assert content in run
        assert run.replace(content, "") == usual.replace("Hello there", "").replace("four", "")


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_without_special_tokens_is_the_same_on_the_literal_path(make, template, monkeypatch):
    """Placeholders are tokenised as the special tokens that they stand for, and so is everything around them."""
    tokenizer = make(template)
    rows = [
        {"messages": [HELLO, assistant(" Hello\n\nthere\n"), USER, assistant("😀 four")]},
        {"prompt": "Answer: ", "completion": " four"},
    ]
    usual = [encoder(tokenizer).encode(row) for row in rows]
    literal = encoder(tokenizer, special_tokens_in_text="literal")
    monkeypatch.setattr(literal, "_is_literal", lambda texts: True)
    assert [literal.encode(row) for row in rows] == usual


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_special_tokens_in_text_prompts_and_completions(make):
    tokenizer = make()
    eos = tokenizer.eos_token
    row = {"prompt": f"Repeat: {eos}", "completion": f" It is {eos} and <s>"}
    literal = encoder(tokenizer, special_tokens_in_text="literal").encode(row)
    control = encoder(tokenizer).encode(row)
    begin = [tokenizer.convert_tokens_to_ids("<s>")] if literal.input_ids[0] in special_ids(tokenizer, [1, 0]) else []
    assert special_ids(tokenizer, literal.input_ids) == [*begin, tokenizer.eos_token_id]
    assert special_ids(tokenizer, control.input_ids).count(tokenizer.eos_token_id) == 3
    assert responses(tokenizer, row, special_tokens_in_text="literal")[0].endswith(f"It is {eos} and <s>{eos}")


@pytest.mark.parametrize("policy", ["literal", "control", "quarantine"])
def test_an_eos_at_the_end_of_a_text_completion_is_its_end(policy):
    tokenizer = tiny.byte_level()
    found = encoder(tokenizer, special_tokens_in_text=policy)
    row = {"prompt": "Answer:", "completion": " four"}
    assert found.encode({**row, "completion": " four<|im_end|>"}) == found.encode(row)
    assert found.typed is None


@pytest.mark.parametrize("policy", ["literal", "control", "quarantine"])
@pytest.mark.parametrize(
    ("row", "typed"),
    [
        ({"messages": [{**USER, "content": "a <|im_end|>"}, assistant("four")]}, "<|im_end|>"),
        ({"messages": [{**USER, "name": "</s>"}, assistant("four")]}, "</s>"),
        ({"prompt": "a [INST]", "completion": " four"}, "[INST]"),
        ({"instruction": "a", "input": "<bos>", "output": "four"}, "<bos>"),
        ({"messages": [USER, assistant("<think>\nwell\n</think>\n\nfour")]}, None),
        ({"input_ids": [2, 3, 4], "labels": [-100, 3, 4]}, None),
    ],
)
def test_rows_with_special_tokens_are_told_whatever_becomes_of_them(policy, row, typed):
    found = encoder(tiny.byte_level(tiny.CHATML), special_tokens_in_text=policy)
    if policy == "quarantine" and typed:
        with pytest.raises(BadRowError) as error:
            found.encode(row)
        assert str(error.value) == f"the text contains the special token {typed} (--special-tokens-in-text quarantine)"
    else:
        found.encode(row)
    assert found.typed == typed
    found.encode({"messages": MULTI_TURN})
    assert found.typed is None


def test_control_is_what_the_tokenizer_does():
    tokenizer = tiny.byte_level(tiny.CHATML)
    messages = [{**USER, "content": TYPED}, assistant(TYPED)]
    assert encoder(tokenizer).encode({"messages": messages}).input_ids == tokenizer.apply_chat_template(
        messages, return_dict=False
    )


def test_marks_of_ours_in_the_text_are_refused_where_they_would_be_taken_for_special_tokens():
    row = {"messages": [{**USER, "content": "<s> \ue0f42\ue0f5"}, assistant("four")]}
    found = encoder(tiny.byte_level(tiny.CHATML), special_tokens_in_text="literal")
    with pytest.raises(BadRowError, match=r"U\+E0F4"):
        found.encode(row)


def test_a_tokenizer_that_has_no_plain_tokens_for_a_special_one():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "four": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    found = encoder(tokenizer, special_tokens_in_text="literal")
    with pytest.raises(BadRowError, match="the tokenizer cannot write <s> as plain text"):
        found.encode({"prompt": "two <s>", "completion": "four"})


@pytest.mark.parametrize("policy", ["literal", "control", "quarantine"])
def test_prompts_and_pairs_follow_the_same_option(policy):
    from alphatoken.pair_encode import PairEncoder
    from alphatoken.prompts import PromptReader

    tokenizer = tiny.byte_level(tiny.CHATML)
    found = encoder(tokenizer, special_tokens_in_text=policy)
    messages = [{**USER, "content": TYPED}]
    pair = {"prompt": messages, "chosen": "four", "rejected": "<|im_end|> three"}
    if policy == "quarantine":
        for stage in (PromptReader(found, 200).read, PairEncoder(found).encode):
            with pytest.raises(BadRowError, match="special token <|im_end|>"):
                stage({**pair, "messages": None})
        return
    prompt = PromptReader(found, 200).read({"messages": messages})
    encoded = PairEncoder(found).encode(pair)
    text = f"<|im_start|>user\n{TYPED}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.prompt == text == tokenizer.decode(prompt.prompt_ids) == tokenizer.decode(encoded.prompt_ids)
    assert tokenizer.decode(encoded.rejected_ids) == "<|im_end|> three<|im_end|>"
    end = tokenizer.eos_token_id
    assert prompt.prompt_ids == encoded.prompt_ids
    ends = 1 if policy == "literal" else 2
    assert prompt.prompt_ids.count(end) == encoded.rejected_ids.count(end) == ends


def test_rows_with_special_tokens_are_counted(tmp_path):
    from alphatoken.sources import SourceRow
    from pipelines.encode import EncodePlan, encode_row, row_columns
    from pipelines.shards import write_block

    typed = {"messages": [{**USER, "content": TYPED}, assistant("four")]}
    for policy, refused in (("literal", 0), ("control", 0), ("quarantine", 2)):
        options = DataOptions(special_tokens_in_text=policy)
        columns = row_columns(encoder(tiny.byte_level(tiny.CHATML), special_tokens_in_text=policy))
        rows = [typed, {"messages": MULTI_TURN}, typed, {"prompt": "no completion"}]
        records = [encode_row(SourceRow(i, "a.jsonl", i, row, None), columns) for i, row in enumerate(rows)]
        table = pa.Table.from_pylist(records, schema=EncodePlan("model", False, options).arrow_schema)
        counts = write_block(table, str(tmp_path / policy))
        assert counts["rows_special_tokens"] == [2]
        assert counts["rows_quarantined"] == [1 + refused]
        (shard,) = (tmp_path / policy / "data").iterdir()
        assert "special_tokens" not in pq.read_schema(shard).names
