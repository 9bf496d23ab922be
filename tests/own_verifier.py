"""A verifier as a user might write it, for tests/test_preference_pipeline.py."""

import os
import signal


def shortest(response: str, answer: str) -> float:
    if "boom" in answer:
        raise ValueError("no such unit")
    return -float(len(response))


def shortest_but_of_apples(response: str, answer: str) -> float:
    return 0.0 if answer == "apples" else -float(len(response))


def last_digits(response: str, answer: str) -> float:
    return float(response[-6:])


def undecided(response: str, answer: str) -> float:
    return 0.0


def deadly(response: str, answer: str) -> float:
    if "boom" in answer:
        os.kill(os.getpid(), signal.SIGKILL)
    return -float(len(response))
