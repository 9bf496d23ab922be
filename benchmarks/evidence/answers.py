"""Exact answers: how many held-out problems a trained model solves, by greedy decoding."""

import torch

from alphatoken.encode import Encoder
from alphatoken.model import ScoringModel, load_model
from benchmarks.evidence.suffix import trained_parameters

LONGEST_PROMPT = 120  # tokens of the chat's prompt
LONGEST_ANSWER = 160
BATCH = 48


def final_number(text: str) -> str | None:
    """What stands behind the last `####` of a GSM8K answer, without commas; None where there is none."""
    _, mark, rest = text.rpartition("####")
    number = rest.split()[0].replace(",", "").rstrip(".") if mark and rest.split() else ""
    return number or None


class AnswerCheck:
    """The whole model again, its last layers those of a trained suffix."""

    def __init__(self, model: str, encoder: Encoder, problems: list[dict], count: int) -> None:
        """problems: `question`, `answer`. The first `count` with short prompts are asked."""
        self.tokenizer = encoder.tokenizer
        self.model = load_model(model, "float32").model
        self.prompts, self.expected = [], []
        for row in problems:
            encoded = encoder.encode({"instruction": row["question"], "response": row["answer"]})
            prompt = encoded.input_ids[: encoded.response_mask.index(True)]
            if len(prompt) <= LONGEST_PROMPT and len(self.prompts) < count:
                self.prompts.append(prompt)
                self.expected.append(final_number(row["answer"]))

    def load(self, scoring: ScoringModel) -> None:
        """Takes over the trained layers of a suffix (suffix.load_suffix)."""
        layers = self.model.model.layers
        trained = trained_parameters(scoring)
        below = len(layers) - len(scoring.model.model.layers)
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in trained.items():
                head, _, rest = name.partition(".layers.")
                number, _, rest = rest.partition(".")
                own[f"{head}.layers.{int(number) + below}.{rest}"].copy_(weight)

    @torch.inference_mode()
    def answers(self) -> list[str]:
        """One response a problem."""
        found: list[str] = []
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        for first in range(0, len(self.prompts), BATCH):
            part = self.prompts[first : first + BATCH]
            width = max(map(len, part))
            input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in part])
            attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            output = self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=LONGEST_ANSWER, do_sample=False, use_cache=True,
                pad_token_id=pad,
            )  # fmt: skip
            found += self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return found

    def solved(self) -> dict[str, float | int]:
        """problems, formed: share that end in `#### number`; solved: share whose number is right."""
        numbers = [final_number(answer) for answer in self.answers()]
        right = [number == expected for number, expected in zip(numbers, self.expected, strict=True)]
        return {
            "problems": len(numbers),
            "formed": sum(number is not None for number in numbers) / len(numbers),
            "solved": sum(right) / len(right),
        }
