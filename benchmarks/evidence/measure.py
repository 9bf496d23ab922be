"""What a trained model is measured on: held-out target loss, perplexity of general text, multiple choice."""

from dataclasses import dataclass

from alphatoken.config import DataOptions
from alphatoken.encode import Encoder
from alphatoken.evaluation import choice_accuracy, estimate, token_loss
from alphatoken.evaluation_rows import Piece, Question, RowReader
from alphatoken.model import ScoringModel
from benchmarks.evidence.data import Row

WINDOW = 128  # tokens of a piece of general text
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measures:
    """Rows of every measure; the same for all runs."""

    target: list[Piece]
    text: list[Piece]
    choices: dict[str, list[Question]]

    def target_loss(self, scoring: ScoringModel) -> tuple[float, list[tuple[float, int]]]:
        """(mean loss per response token, per row its summed loss and tokens)."""
        found = token_loss(scoring, self.target, BATCH_TOKENS)
        return estimate(found).value, [(round(s, 4), c) for _, (s, c) in sorted(found.by_row.items())]

    def retention(self, scoring: ScoringModel, with_choices: bool) -> dict[str, float]:
        """Loss per token of general text; accuracy of multiple choice, length-normalised."""
        found = {"text_loss": estimate(token_loss(scoring, self.text, BATCH_TOKENS)).value}
        if with_choices:
            for name, questions in self.choices.items():
                _, normalized = choice_accuracy(scoring, questions, BATCH_TOKENS)
                found[name] = estimate(normalized).value
        return found


def make_measures(
    encoder: Encoder, target: list[Row], text: list[dict], choices: dict[str, list[dict]], windows: int, questions: int
) -> Measures:
    """The first rows of each file: `windows` pieces of text, `questions` of each kind."""
    pieces = [Piece(i, row.input_ids, row.response_mask) for i, row in enumerate(target)]
    short = Encoder(encoder.tokenizer, DataOptions(max_length=WINDOW), encoder.vocab_size)
    reader = RowReader(short, "exact", WINDOW)
    parts = [piece for i, row in enumerate(text) for piece in reader.pieces(i, row)]
    stride = max(1, len(parts) // windows)
    text_pieces = [Piece(i, p.input_ids, p.response_mask) for i, p in enumerate(parts[::stride][:windows])]
    read = {
        name: [RowReader(encoder, "exact", WINDOW).question(i, row) for i, row in enumerate(rows[:questions])]
        for name, rows in choices.items()
    }
    return Measures(pieces, text_pieces, read)
