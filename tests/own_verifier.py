"""A verifier as a user might write it, for tests/test_preference_pipeline.py."""


def shortest(response: str, answer: str) -> float:
    if "boom" in answer:
        raise ValueError("no such unit")
    return -float(len(response))
