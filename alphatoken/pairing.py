"""From the scored responses of one prompt to preference pairs: best against worst. Pure functions.

A response that was cut off may lose, but never win: it does not end. Texts that agree up to whitespace are one.
"""

from dataclasses import dataclass

UNDECIDED = "all responses have the same score"


@dataclass(frozen=True)
class Candidate:
    """A response to a prompt. sample: its number, -1 for the data set's own answer."""

    sample: int
    text: str
    token_ids: list[int] | None
    finished: bool = True


@dataclass(frozen=True)
class Pair:
    chosen: Candidate
    rejected: Candidate
    chosen_score: float
    rejected_score: float


def distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The first of each text that was not cut off, else the first; blanks aside. Empty ones go."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        text = " ".join(candidate.text.split())
        if text and (text not in found or candidate.finished > found[text].finished):
            found[text] = candidate
    return list(found.values())


def best_against_worst(
    candidates: list[Candidate], scores: list[float], margin: float | None = None, max_pairs: int = 1
) -> list[Pair] | str:
    """Pairs of the best with the worst, the second best with the second worst, and so on; or why there is none.

    margin: least difference of scores; None: any difference. Ties go by sample number, so the result is the same
    whatever the order of the candidates.
    """
    if len(candidates) < 2:
        return "fewer than two different responses"
    order = sorted(zip(scores, candidates, strict=True), key=lambda entry: (-entry[0], entry[1].sample))
    if order[0][0] == order[-1][0]:
        return f"{UNDECIDED} ({order[0][0]:g})"
    winners = [entry for entry in order if entry[1].finished]
    if not winners:
        return "every response was cut off, so none can be chosen"
    pairs: list[Pair] = []
    used: set[int] = set()
    for (high, chosen), (low, rejected) in zip(winners, _losers(order), strict=False):
        enough = high > low and (margin is None or high - low >= margin)
        if len(pairs) == max_pairs or not enough or {chosen.sample, rejected.sample} & used:
            break
        used |= {chosen.sample, rejected.sample}
        pairs.append(Pair(chosen, rejected, high, low))
    if pairs:
        return pairs
    if winners[0][0] == order[-1][0]:
        return "the only better responses were cut off"
    return f"scores differ by {winners[0][0] - order[-1][0]:g}, less than the margin {margin:g}"


def _losers(order: list[tuple[float, Candidate]]) -> list[tuple[float, Candidate]]:
    """Worst first; among equals the finished ones, then by sample number."""
    return sorted(order, key=lambda entry: (entry[0], not entry[1].finished, entry[1].sample))
