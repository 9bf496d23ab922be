"""Measures against one row at a time in float64, row formats, and verifiers."""

import math
import random
import re
from decimal import Decimal
from itertools import pairwise

import pytest
import torch
from tiny_models import random_rows, tiny_model
from tiny_tokenizers import CHATML, byte_level
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import GenerationConfig

from alphatoken.config import DataOptions
from alphatoken.encode import ALPACA_PROMPT, Encoder
from alphatoken.errors import BadRowError, UserError
from alphatoken.evaluation import (
    RowSums,
    answer_accuracy,
    choice_accuracy,
    estimate,
    stop_ids,
    token_loss,
)
from alphatoken.evaluation_rows import VERIFIERS, Piece, RowReader, answer_index, check_columns, final_number
from alphatoken.generation import generate
from alphatoken.model import ScoringModel, prepare_model

SMALL, LARGE = 16, 4096  # batch_tokens: about one row per batch, all rows in one
CHAT = byte_level(CHATML)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny products: on a busy machine threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scoring() -> ScoringModel:
    """A Llama in float64 with the vocabulary of CHAT."""
    return prepare_model(tiny_model("llama", dtype=torch.float64, vocab_size=len(CHAT)))


def reader(tokenizer=CHAT, verifier="number", longest_prompt=200, **options) -> RowReader:
    return RowReader(Encoder(tokenizer, DataOptions(**options), len(CHAT)), verifier, longest_prompt)


def plain_losses(model, ids: list[int]) -> torch.Tensor:
    """(T - 1,) losses of ids[1:], one row, no padding."""
    tensor = torch.tensor([ids])
    return F.cross_entropy(model(input_ids=tensor, use_cache=False).logits[0, :-1], tensor[0, 1:], reduction="none")


def answer_alone(model, prompt: list[int], count: int, ends: set[int]) -> list[int]:
    """Greedy tokens without cache, padding or `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# loss


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_token_loss_is_that_of_every_row_alone(architecture):
    scoring = prepare_model(tiny_model(architecture, dtype=torch.float64))
    ids, masks = random_rows(1, 12)
    pieces = [Piece(100 + i, *row) for i, row in enumerate(zip(ids, masks, strict=True))]
    found = token_loss(scoring, pieces, LARGE)
    for piece in pieces:
        losses = plain_losses(scoring.model, piece.input_ids)[torch.tensor(piece.response_mask[1:])]
        total, count = found.by_row[piece.row_id]
        assert count == len(losses) and total == pytest.approx(float(losses.sum()), rel=1e-10)
    for other in (token_loss(scoring, pieces[::-1], SMALL), token_loss(scoring, iter(pieces), 100)):
        assert {row: pytest.approx(pair, rel=1e-10) for row, pair in other.by_row.items()} == found.by_row


def test_every_token_of_a_text_but_the_first_counts_once(scoring):
    text = "The answer is four, and two plus three is five. " * 4
    ids = CHAT(text)["input_ids"]
    pieces = reader(max_length=16).pieces(7, {"text": text, "source": "web"})
    assert len(pieces) > 3 and all(len(piece.input_ids) <= 16 for piece in pieces)
    assert [token for piece in pieces for token in piece.input_ids[1:]] == ids[1:]
    assert all(piece.response_mask == [False] + [True] * (len(piece.input_ids) - 1) for piece in pieces)
    found = token_loss(scoring, pieces, LARGE)
    expected = sum(float(plain_losses(scoring.model, piece.input_ids).sum()) for piece in pieces)
    assert found.count == len(ids) - 1 and found.total == pytest.approx(expected, rel=1e-10)
    (whole,) = reader().pieces(7, {"text": text})
    assert whole.input_ids == ids
    for length in (2, 3, len(ids) - 1, len(ids)):  # a last window of one token has nothing to predict
        parts = reader(max_length=length).pieces(0, {"text": text})
        assert sum(len(part.input_ids) - 1 for part in parts) == len(ids) - 1
        assert min(len(part.input_ids) for part in parts) > 1
    bos = byte_level(bos=True)
    (piece,) = reader(bos).pieces(0, {"text": "four"})
    assert piece.input_ids[0] == bos.convert_tokens_to_ids("<s>") and piece.response_mask[1]


def test_loss_rows_of_other_formats_are_encoded():
    row = {"prompt": "two plus two?", "completion": " four", "text": "ignored"}
    (piece,) = reader().pieces(0, row)
    assert piece.input_ids == reader().encoder.encode(row).input_ids
    (renamed,) = reader(columns={"text": "prompt"}).pieces(0, row)
    assert renamed.input_ids == CHAT("two plus two?")["input_ids"]
    bad = (({"text": ""}, "fewer than two tokens"), ({"text": 5}, "text is a int"), ({"body": "x"}, "known format"))
    for row, reason in bad:
        with pytest.raises(BadRowError, match=reason):
            reader().pieces(0, row)


# how sure


def test_errors_of_estimates():
    accuracy = estimate(RowSums({i: (float(i < 3), 1) for i in range(10)}))
    assert accuracy.value == pytest.approx(0.3)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    generator = random.Random(0)
    counts = {i: generator.randint(5, 60) for i in range(400)}
    before = RowSums({i: (count * generator.gauss(2, 0.5), count) for i, count in counts.items()})
    after = RowSums({i: (s - 0.1 * c + generator.gauss(0, 1), c) for i, (s, c) in before.by_row.items()})
    loss, change = estimate(before), estimate(after) - estimate(before)
    draws = [generator.choices(range(400), k=400) for _ in range(400)]

    def resampled(rows: RowSums, draw: list[int]) -> float:
        return sum(rows.by_row[i][0] for i in draw) / sum(rows.by_row[i][1] for i in draw)

    losses = torch.tensor([resampled(before, draw) for draw in draws])
    changes = torch.tensor([resampled(after, draw) - resampled(before, draw) for draw in draws])
    assert loss.standard_error == pytest.approx(float(losses.std()), rel=0.15)
    assert change.standard_error == pytest.approx(float(changes.std()), rel=0.15)
    assert change.standard_error < 0.2 * loss.standard_error  # what the rows have in common cancels
    assert loss.exp().value == pytest.approx(math.exp(loss.value))
    assert loss.exp().standard_error == pytest.approx(float(losses.exp().std()), rel=0.15)
    assert (loss - loss).standard_error == 0


def test_estimates_at_the_edge():
    assert math.isnan(estimate(RowSums({0: (1.0, 4)})).standard_error)
    assert estimate(RowSums({0: (9000.0, 4), 1: (9000.0, 4)})).exp().value == math.inf
    assert math.isnan(estimate(RowSums({0: (math.nan, 4)})).exp().value)
    with pytest.raises(ValueError, match="no row"):
        estimate(RowSums({}))


# multiple choice


def question_rows(count: int) -> list[dict]:
    generator = random.Random(2)
    words = ["four", "five", "two", "three", "plus", "today", "answer", "you", "are"]
    rows = []
    for i in range(count):
        choices = [" ".join(generator.choices(words, k=generator.randint(1, 6))) for _ in range(2 + i % 3)]
        query = " ".join(generator.choices(words, k=generator.randint(2, 12)))
        rows.append({"question": query, "choices": choices, "answer": generator.randrange(len(choices))})
    return rows


def test_choices_against_every_choice_alone(scoring):
    rows = question_rows(15)
    questions = [reader().question(i, row) for i, row in enumerate(rows)]
    plain, normalized = choice_accuracy(scoring, questions, LARGE)
    for question, row in zip(questions, rows, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        scores, per_character = [], []
        for choice in row["choices"]:
            ids, start = CHAT(f"{prompt} {choice}")["input_ids"], len(CHAT(prompt)["input_ids"])
            assert ids[:start] == CHAT(prompt)["input_ids"]
            scores.append(-float(plain_losses(scoring.model, ids)[start - 1 :].sum()))
            per_character.append(scores[-1] / len(choice))
        assert plain.by_row[question.row_id] == (float(scores.index(max(scores)) == row["answer"]), 1)
        best = per_character.index(max(per_character))
        assert normalized.by_row[question.row_id] == (float(best == row["answer"]), 1)
    assert plain.by_row != normalized.by_row and 0 < plain.total < len(rows)
    assert choice_accuracy(scoring, questions[::-1], SMALL) == (plain, normalized)


def test_a_model_that_gives_nan_solves_nothing():
    broken = prepare_model(tiny_model("llama", vocab_size=len(CHAT)))
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(math.nan)
    plain, normalized = choice_accuracy(broken, [reader().question(0, question_rows(1)[0] | {"answer": 0})], LARGE)
    assert plain.total == normalized.total == 0


def test_choice_styles_and_their_boundary():
    two = ["four", "five today"]
    hellaswag = reader().question(0, {"ctx": "two plus two is", "endings": two, "label": "1"})
    assert [CHAT.decode(ids) for ids in hellaswag.choices] == ["two plus two is four", "two plus two is five today"]
    assert (hellaswag.answer, hellaswag.characters) == (1, [4, 10])
    assert CHAT.decode(hellaswag.choices[1][hellaswag.start :]) == " five today"
    # A blank at the prompt's end belongs to the choice: the tokens are those of the joined text.
    blank = reader().question(0, {"query": "two plus two is ", "choices": two, "gold": 0})
    assert (blank.choices, blank.start) == (hellaswag.choices, hellaswag.start)
    arc = {"question": "two?", "choices": {"text": two, "label": ["1", "2"]}, "answerKey": "2"}
    assert reader().question(0, arc).answer == 1
    assert CHAT.decode(reader().question(0, arc).choices[0]) == "Question: two?\nAnswer: four"


def test_a_context_with_a_question_is_reading_comprehension():
    rest = {"choices": ["four", "five"], "answer": 0}
    boolq = {"passage": "two plus two is four. ", "question": "is it five"}

    def prompt(row: dict, **columns) -> str:
        question = reader(columns=columns).question(0, row | rest)
        return CHAT.decode(question.choices[0][: question.start])

    both = "two plus two is four.\nQuestion: is it five\nAnswer:"
    assert prompt({"context": boolq["passage"], "question": "is it five"}) == both
    assert prompt({"ctx": boolq["passage"], "question": "is it five"}) == both
    assert prompt(boolq, context="passage") == both
    alone = "Question: is it five\nAnswer:"
    assert prompt(boolq) == alone
    assert prompt({"context": "", "question": "is it five"}) == alone
    assert prompt({"context": None, "question": "is it five"}) == alone
    assert prompt({"context": "two is", "question": None}) == "two is"
    assert prompt(boolq | {"query": "two is", "context": "four"}) == "two is"  # the whole prompt
    assert prompt(boolq | {"query": "is it five"}, context="passage", question="query") == both
    with pytest.raises(BadRowError, match="question is empty"):
        prompt({"context": "two is", "question": " "})
    hellaswag = {"ctx_a": "two plus", "ctx_b": "two is", "ctx": "two plus two is", "activity_label": "sums"}
    assert prompt(hellaswag) == "two plus two is"


def test_a_choice_that_merges_with_the_prompt_moves_the_boundary_of_all():
    class Merging:
        """A token for every character, and one for `is four`."""

        is_fast, name_or_path, added_tokens_decoder, eos_token_id = True, "merging", {}, None

        def __call__(self, text, **options):
            ids = [300 if part == "is four" else ord(part) for part in re.findall("is four|.", text)]
            return {"input_ids": ids, "offset_mapping": []}

    question = reader(Merging()).question(0, {"query": "it is", "choices": ["four", "five"], "answer": 0})
    assert question.start == 3
    assert [ids[3:] for ids in question.choices] == [[300], [ord(letter) for letter in "is five"]]


def test_long_questions_lose_the_start_of_their_prompt():
    row = {"query": "two plus three is five and " * 5, "choices": ["four", "five today, you are"], "answer": 0}
    whole = reader().question(0, row)
    longest = max(map(len, whole.choices))
    cut = reader(max_length=longest - 3).question(0, row)
    assert cut.truncated and not whole.truncated
    assert cut.choices == [ids[3:] for ids in whole.choices] and cut.start == whole.start - 3
    for options in ({"max_length": longest - 3, "too_long": "quarantine"}, {"max_length": 4}):
        with pytest.raises(BadRowError, match="more than max_length"):
            reader(**options).question(0, row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": 3}, "3 is none of the 2 choices"),
        ({"answer": -1}, "none of the 2"),
        ({"answer": "C"}, "none of the 2"),
        ({"answer": "four"}, "none of the 2"),
        ({"answer": True}, "none of the 2"),
        ({"answer": ""}, "none of the 2"),
        ({"answer": None}, r"^answer is missing \(null\)$"),
        ({"choices": None}, r"^choices is missing \(null\)$"),
        ({"query": None}, r"^query is missing \(null\), not text$"),
        ({"choices": ["four"]}, "two texts or more"),
        ({"choices": ["four", ""]}, "empty or not text"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "other labels"),
        ({"query": " "}, "query is empty"),
        ({"query": 5}, "not text"),
    ],
)
def test_bad_questions(change, reason):
    with pytest.raises(BadRowError, match=reason):
        reader().question(0, {"query": "two?", "choices": ["four", "five"], "answer": 0} | change)


def test_answer_names():
    assert [answer_index(name, None, 4) for name in (2, "2", "c", "C", " D ")] == [2, 2, 2, 2, 3]
    assert answer_index("1", ["1", "2"], 2) == 0 and answer_index("B", ["A", "B"], 2) == 1
    assert [answer_index(name, ["1", "2", "3"], 3) for name in (1, "2", 3)] == [0, 1, 2]
    assert answer_index(0, ["A", "B"], 2) == 0  # no label is a number
    for name in ("0", 0):
        with pytest.raises(BadRowError):
            answer_index(name, ["1", "2"], 2)
    numbered = {"query": "two plus two", "choices": {"text": ["three", "four", "five"], "label": [1, 2, 3]}}
    assert reader().question(0, numbered | {"answer": 2}).answer == 1


def test_check_columns_names_what_is_missing():
    check_columns("loss", {"text": "a"}, {}, "f")
    check_columns("answers", {"q": "a", "a": "b"}, {"prompt": "q", "completion": "a"}, "f")
    with pytest.raises(UserError, match="f: The columns do not form a multiple-choice question: found query"):
        check_columns("choices", {"query": "a"}, {}, "f")
    check_columns("choices", {"query": "a", "choices": ["a", "b"], "answer": None}, {}, "f")  # a matter of that row
    check_columns("choices", {"question": None, "choices": None, "label": None, "answer": 1}, {}, "f")
    with pytest.raises(UserError, match="known format"):
        check_columns("answers", {"text": "a"}, {}, "f")
    with pytest.raises(UserError, match="for --loss also text"):
        check_columns("loss", {"body": "a"}, {}, "f")


# exact answers


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt2"])
def test_greedy_answers_are_those_of_every_prompt_alone(architecture):
    # transformers' own attention, which capped logits need here, gives NaN on padding in float64.
    dtype = torch.float32 if architecture == "gemma2" else torch.float64
    scoring = prepare_model(tiny_model(architecture, seed=5, dtype=dtype))
    settings = GenerationConfig(repetition_penalty=3.0, min_new_tokens=8, eos_token_id=2)
    scoring.model.generation_config = settings
    attention = scoring.model.config._attn_implementation
    prompts = [ids[:length] for ids, length in zip(random_rows(4, 5)[0], (3, 6, 1, 5, 4), strict=True)]
    ends = {2} | {answer_alone(scoring.model, prompts[0], 3, set())[-1]}
    expected = [answer_alone(scoring.model, prompt, 10, ends) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    assert generate(scoring, prompts, max_new_tokens=10, end_ids=ends) == expected
    assert [generate(scoring, [prompt], max_new_tokens=10, end_ids=ends)[0] for prompt in prompts] == expected
    assert scoring.model.generation_config is settings and scoring.model.config._attn_implementation == attention


def test_answer_accuracy(scoring):
    ends = stop_ids(scoring, CHAT)
    words = ["four", "five", "two", "three", "plus", "today"]
    rows = [{"prompt": " ".join(words[: 1 + i]), "completion": "7"} for i in range(6)]
    prompts = [reader().prompt(i, row) for i, row in enumerate(rows)]
    answers = [answer_alone(scoring.model, prompt.input_ids, 6, ends) for prompt in prompts]
    texts = [CHAT.decode(answer, skip_special_tokens=True) for answer in answers]
    said = zip(rows, texts, strict=True)
    rows = [row | {"completion": text if i % 2 else "another"} for i, (row, text) in enumerate(said)]
    prompts = [reader(verifier="exact").prompt(i, row) for i, row in enumerate(rows)]
    for order, batch_tokens in ((prompts, LARGE), (prompts[::-1], SMALL), (prompts, 30)):
        solved, cut = answer_accuracy(
            scoring, CHAT, order, VERIFIERS["exact"], max_new_tokens=6, batch_tokens=batch_tokens
        )
        assert solved.by_row == {i: (float(i % 2), 1) for i in range(6)}
        assert cut == sum(not ends.intersection(answer) for answer in answers)


def test_stop_ids_of_the_checkpoints_settings(scoring):
    before = scoring.model.generation_config
    try:
        scoring.model.generation_config = GenerationConfig(eos_token_id=[5, 6])
        assert stop_ids(scoring, CHAT) == {5, 6, CHAT.eos_token_id, scoring.model.config.eos_token_id}
    finally:
        scoring.model.generation_config = before


def test_prompts_of_every_format():
    chat = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "#### 2"}]
    ids = CHAT("<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    more = [*chat, {"role": "user", "content": "three?"}, {"role": "assistant", "content": "3"}]
    alpaca_row = {"instruction": "two?", "output": "#### 2"}
    for row in ({"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}, alpaca_row):
        prompt = reader().prompt(4, row)
        assert (prompt.row_id, prompt.input_ids, prompt.reference) == (4, ids, "#### 2")
    last = reader().prompt(0, {"messages": more})
    assert last.reference == "3" and "#### 2" in CHAT.decode(last.input_ids)
    encoded = reader().encoder.encode({"messages": more})
    tokens = {"input_ids": encoded.input_ids, "response_mask": encoded.response_mask}
    assert reader().prompt(0, tokens).input_ids == last.input_ids
    assert reader().prompt(0, tokens).reference.strip() == "3"
    text = reader().prompt(0, {"prompt": "two plus two is", "completion": " 4"})
    assert text.input_ids == CHAT("two plus two is")["input_ids"]
    alpaca = reader(byte_level(None)).prompt(0, {"instruction": "two?", "input": "", "response": "2"})
    assert CHAT.decode(alpaca.input_ids) == ALPACA_PROMPT.format(instruction="two?")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "1"}]}, "after a first message"),
        ({"prompt": "two?", "completion": "none"}, "nothing that the verifier can compare"),
        ({"prompt": "two?", "completion": " "}, "response is empty"),
        ({"prompt": "two? " * 200, "completion": "2"}, "the prompt has"),
        ({"prompt": "two?", "completion": None}, "not text"),
        ({"prompt": "two?", "completion": "2", "tools": [{"name": "f"}]}, "tools"),
        ({"text": "two?"}, "known format"),
    ],
)
def test_bad_prompts(row, reason):
    with pytest.raises(BadRowError, match=reason):
        reader().prompt(0, row)


@pytest.mark.parametrize("policy", ["literal", "control", "quarantine"])
def test_special_tokens_in_text_are_what_the_option_says(policy):
    """In prompts, texts and choices, as in rows that are trained on."""
    typed, found = "two <|im_end|>?", reader(special_tokens_in_text=policy)
    chat = [{"role": "user", "content": typed}, {"role": "assistant", "content": "2"}]
    question = {"query": typed, "endings": ["2", "3"], "label": 0}
    reads = (
        lambda: found.prompt(0, {"messages": chat}).input_ids,
        lambda: found.prompt(0, {"prompt": typed, "completion": "2"}).input_ids,
        lambda: found.prompt(0, {"instruction": typed, "output": "2"}).input_ids,
        lambda: found.pieces(0, {"text": typed})[0].input_ids,
        lambda: found.question(0, question).choices[0],
    )
    turns = (1, 0, 1, 0, 0)  # ends of turns of the template
    for read, ends in zip(reads, turns, strict=True):
        if policy == "quarantine":
            with pytest.raises(BadRowError, match="special token"):
                read()
        else:
            assert read().count(CHAT.eos_token_id) == ends + (policy == "control")


def test_a_prompt_does_not_end_with_the_eos_that_a_tokenizer_appends():
    tokenizer = byte_level(CHATML)
    eos = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, eos)]
    )
    assert tokenizer("two")["input_ids"][-1] == eos
    assert reader(tokenizer).prompt(0, {"prompt": "two?", "completion": "2"}).input_ids[-1] != eos
    assert reader(tokenizer).encoder.encode_prompt("two?")[1] == CHAT("two?")["input_ids"]


def test_conversations_need_a_chat_template():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]
    with pytest.raises(UserError, match="chat template"):
        reader(byte_level(None)).prompt(0, {"messages": messages})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 apples, then 5.\n#### 70000", "70000"),
        ("#### 1,234,567", "1234567"),
        ("####$-5.50 dollars, 3 of them", "-5.5"),
        ("#### -$12", "-12"),
        ("#### 8\nQuestion: what is 4 + 5?\n#### 9", "8"),
        ("#### Step 1\nadd 2 and 3, which makes 5.", "5"),
        ("The answer is $1,234.50.", "1234.5"),
        ("So 10-3=7.", "7"),
        ("it is 10-3", "3"),
        ("it is (2)-3", "3"),
        ("x = -4", "-4"),
        ("x = \N{MINUS SIGN}4", "-4"),
        ("the choices are 1,2,3", "3"),
        ("12,34", "34"),
        ("about .5", "0.5"),
        ("**18**", "18"),
        ("50% or \\boxed{42}", "42"),
        ("18.00", "18"),
        ("version 1.2.3", "3"),
        ("none at all", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_ignores_whitespace_only():
    exact = VERIFIERS["exact"]
    assert exact(" a\n b\t") == exact("a b") != exact("A b")


def test_estimates_do_not_depend_on_row_order():
    rows = {i: (0.1 * i, i + 1) for i in range(50)}
    found = [estimate(RowSums(dict(order))) for order in (rows.items(), reversed(rows.items()))]
    assert all(a.standard_error == b.standard_error and a.value == b.value for a, b in pairwise(found))
