"""Judges: from the responses of a shard to a score for each, or why a prompt has none.

A judge is made once per task or actor and called with the prompts of a shard. The one that asks an LLM needs an
engine, so it is a pair of functions around it: questions of a shard, and scores from the verdicts.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from alphatoken.batching import plan_batches
from alphatoken.chat import ChatRenderer
from alphatoken.config import DataOptions
from alphatoken.errors import BadRowError, UserError, first_line
from alphatoken.failed_batches import check_set_up, reason_of, with_halves
from alphatoken.generate_config import PairConfig
from alphatoken.model import default_device
from alphatoken.model_encoder import make_encoder
from alphatoken.pairing import Candidate
from alphatoken.tokenizer import load_config, load_tokenizer
from alphatoken.verifiers import load_verifier, score_response
from pipelines.cluster import prepare_worker

ANSWER = -1  # sample number of the data set's own answer
QUESTION = (
    "Which of two responses answers the request better?\n\n[Request]\n{prompt}\n\n[Response A]\n{first}\n\n"
    "[Response B]\n{second}\n\nAnswer with one letter: A or B."
)
VERDICT = re.compile(r"\b([AB])\b")


@dataclass
class Group:
    """A prompt with its different responses, and what the judge says: a score for each, or a reason for none."""

    row_id: int  # of the prompt
    row: dict[str, Any]  # the first of its RESPONSES rows: prompt, messages, answer, prompt_ids, id
    candidates: list[Candidate]
    identical: int = 0  # responses that were left out because their text was there already
    empty: int = 0  # that were left out because they have no text
    scores: list[float] = field(default_factory=list)
    reason: str | None = None


class Verifier:
    """Right or wrong against the data set's answer."""

    def __init__(self, config: PairConfig, folder: str) -> None:
        self.verify = load_verifier(config.verifier, folder)

    def __call__(self, groups: Iterable[Group]) -> None:
        for group in groups:
            answer = group.row["answer"]
            if answer is None or not answer.strip():
                group.reason = "the prompt has no answer to verify with"
                continue
            try:
                group.scores = [score_response(self.verify, each.text, answer) for each in group.candidates]
            except BadRowError as error:
                group.reason = str(error)
                continue
            for value, word in ((1.0, "right"), (0.0, "wrong")):
                if all(score == value for score in group.scores):
                    group.reason = f"all samples are {word}"


class Reference:
    """The data set's own answer against the first sample that says something else."""

    def __init__(self, config: PairConfig, generated: dict) -> None:
        options = DataOptions(max_length=generated["context"])
        model = generated["config"]["model"]
        self.encoder = make_encoder(model, options, config.trust_remote_code)  # the folder may be somebody else's
        if generated.get("chat_template"):
            self.encoder.tokenizer.chat_template = generated["chat_template"]

    def __call__(self, groups: Iterable[Group]) -> None:
        for group in groups:
            try:
                own = Candidate(ANSWER, _answer(group), self._token_ids(group))
            except BadRowError as error:
                group.reason = str(error)
                continue
            others = [each for each in group.candidates if each.text.split() != own.text.split()]
            if not others:
                group.reason = "every sample is the answer itself"
            group.candidates, group.scores = [own, *others[:1]], [1.0, 0.0][: 1 + len(others[:1])]

    def _token_ids(self, group: Group) -> list[int]:
        """The answer's tokens behind the prompt's."""
        row, answer, prompt = group.row, _answer(group), group.row["prompt_ids"]
        if row["messages"]:
            ids, mask = self.encoder.encode_completion(
                {"prompt": row["messages"], "completion": [{"role": "assistant", "content": answer}]}
            )
            ids = ids[: len(mask) - mask[::-1].index(True)]  # without what a template puts behind the turn
        else:
            ids, _ = self.encoder.encode_completion({"prompt": row["prompt"], "completion": answer})
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise BadRowError("the tokens of the answer do not continue those of the prompt")
        return ids[len(prompt) :]


def _answer(group: Group) -> str:
    answer = group.row["answer"]
    if answer is None or not answer.strip():
        raise BadRowError("the prompt has no answer of its own")
    return answer


class RewardModel:
    """A sequence classifier with one label: the higher, the better."""

    def __init__(self, config: PairConfig, threads: int) -> None:
        from transformers import AutoModelForSequenceClassification

        prepare_worker(threads)
        self.batch_tokens = config.batch_tokens
        self.device = default_device() if config.gpus_per_replica else torch.device("cpu")
        assert config.judge_model is not None
        self.tokenizer = load_tokenizer(config.judge_model, config.trust_remote_code)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                config.judge_model, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load reward model {config.judge_model!r}: {first_line(error)}") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.pad_token_id = self.tokenizer.pad_token_id  # where the model finds the last token of a row
        self.renderer = ChatRenderer(self.tokenizer) if self.tokenizer.chat_template else None
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.model = model.to(self.device).eval()

    def __call__(self, groups: Iterable[Group]) -> None:
        rows: list[tuple[Group, int, list[int]]] = []
        for group in groups:
            try:
                ids = [self._token_ids(group.row, each.text) for each in group.candidates]
            except BadRowError as error:
                group.reason = str(error)
                continue
            if self.longest and max(map(len, ids), default=0) > self.longest:
                group.reason = f"a response has more tokens than the {self.longest} of the reward model"
                continue
            group.scores = [0.0] * len(ids)
            rows += [(group, index, tokens) for index, tokens in enumerate(ids)]
        errors: dict[int, Exception] = {}
        for batch in plan_batches([len(tokens) for _, _, tokens in rows], self.batch_tokens):
            for part, scores in with_halves(lambda part: self._scores([rows[i][2] for i in part]), batch, errors):
                for i, score in zip(part, scores, strict=True):
                    group, index, _ = rows[i]
                    group.scores[index] = score
                    if not math.isfinite(score):
                        group.reason = "the reward of a response is not finite (NaN or infinity)"
        if len(errors) == len(rows):
            check_set_up(errors)
        for i, failure in errors.items():
            rows[i][0].reason = f"a response has no reward: {reason_of(failure, len(rows[i][2]))}"

    @torch.no_grad()
    def _scores(self, ids: list[list[int]]) -> list[float]:
        padded = self.tokenizer.pad({"input_ids": ids}, padding=True, padding_side="right", return_tensors="pt")
        return self.model(**padded.to(self.device)).logits[:, 0].double().tolist()

    def _token_ids(self, row: dict, text: str) -> list[int]:
        if row["messages"] and self.renderer:
            rendered = self.renderer.render([*row["messages"], {"role": "assistant", "content": text}])
            return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return self.tokenizer(plain_prompt(row) + "\n" + text if row["messages"] else row["prompt"] + text)["input_ids"]


def check_reward_model(config: PairConfig) -> None:
    """Raises UserError unless it has one label."""
    assert config.judge_model is not None
    labels = load_config(config.judge_model, config.trust_remote_code).num_labels
    if labels != 1:
        raise UserError(
            f"--judge-model {config.judge_model} has {labels} labels: a reward model has one, whose logit is the reward"
        )


# an LLM as judge


def questions(group: Group, template: str) -> list[tuple[int, int, str]]:
    """(first candidate, second candidate, question) for every two of them, in both orders."""
    count = len(group.candidates)
    return [
        (first, second, _fill(template, group, first, second))
        for first in range(count)
        for second in range(count)
        if first != second
    ]


def _fill(template: str, group: Group, first: int, second: int) -> str:
    """By replacement, not str.format: the texts may have braces."""
    texts = {
        "{prompt}": plain_prompt(group.row),
        "{first}": group.candidates[first].text,
        "{second}": group.candidates[second].text,
    }
    return re.sub(r"\{(?:prompt|first|second)\}", lambda found: texts[found[0]], template)


def plain_prompt(row: dict) -> str:
    """The prompt for a reader who knows no chat template."""
    messages = row["messages"]
    if not messages:
        return row["prompt"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def read_verdict(text: str | None) -> str | None:
    """A or B: the first that stands alone."""
    found = VERDICT.search(text or "")
    return found[1] if found else None


def settle(group: Group, verdicts: dict[tuple[int, int], str | None]) -> int:
    """Scores from verdicts by (first, second): wins minus losses where both orders agree. Returns how many
    comparisons did not. Where none did, the prompt is set aside.
    """
    count = len(group.candidates)
    scores, contradictions, agreed = [0.0] * count, 0, 0
    for i in range(count):
        for j in range(i + 1, count):
            one, other = verdicts.get((i, j)), verdicts.get((j, i))
            if one is None or other is None or one == other:  # the same letter both times: two different responses
                contradictions += 1
                continue
            agreed += 1
            winner, loser = (i, j) if one == "A" else (j, i)
            scores[winner] += 1
            scores[loser] -= 1
    group.scores = scores
    if count > 1 and not agreed:
        unread = all(verdict is None for verdict in verdicts.values())
        group.reason = "the judge gave no verdict" if unread else "the judge's verdicts depend on the order"
    return contradictions


def read_template(path: str | None) -> str:
    """The question to the judge. Raises UserError where it lacks a place for a response."""
    if path is None:
        return QUESTION
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--judge-template {path}: cannot be read ({error})") from error
    missing = [place for place in ("{prompt}", "{first}", "{second}") if place not in text]
    if missing:
        raise UserError(f"--judge-template {path} lacks {', '.join(missing)}")
    return text


def carried(group: Group, shard: str, first: int, second: int) -> str:
    return json.dumps({"shard": shard, "row_id": group.row_id, "first": first, "second": second})
