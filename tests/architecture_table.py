"""The table in docs/architectures.md: which estimator runs on which architecture, found by running it.

`python -m tests.architecture_table` writes the page. That what runs is also right is what the tests against float64
definitions show; tests/test_architecture.py checks that they cover every "yes".
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # tests import each other by bare names

from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, random_rows, tiny_model

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import RELATIVE_STEPS, Exact
from alphatoken.fisher import diagonal_fisher
from alphatoken.model import load_model
from alphatoken.value_propagation import ValuePropagation

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

COLUMNS = [
    "`exact --method forward`",
    "`exact --method central`",
    "`value_propagation`",
    "direction",
    "Fisher (stability)",
]
NAMES = {
    "llama": "Llama, SmolLM2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral (sliding window)",
    "gemma2": "Gemma-2 (sliding window, soft-capped logits)",
    "phi3": "Phi-3",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "olmo2": "OLMo-2 (query and key norms over the whole width)",
    "granite": "Granite (residual, attention and logit multipliers)",
    "smollm3": "SmolLM3 (layers without positions)",
    "phi4": "Phi-4 (Phi-3's code)",
    "gemma3_text": "Gemma-3, text (sliding window)",
    "bloom": "Bloom (ALiBi)",
    "falcon": "Falcon (ALiBi)",
    "mixtral": "Mixtral (experts)",
    "qwen3_moe": "Qwen3-MoE (experts)",
    "gpt_oss": "gpt-oss (experts with biases, attention sinks, sliding window)",
    "llama4_text": "Llama-4, text (experts, chunked attention)",
    "qwen3_next": "Qwen3-Next (linear attention, experts)",
}

TEXT = """# Architectures

Written by `python -m tests.architecture_table`, which runs every estimator on tiny random models. Every "yes" of
`exact`, the direction and `value_propagation` is tested against a definition in float64: one backward pass per token,
one per row, and the paper's cross products.

| architecture | {columns} |
| --- |{rules}
{rows}

- `all-linear` and `last-layers:K` take in every matrix of a layer: linear layers, fused experts (one 3-D weight), their
  router, and the convolution of linear attention. Norms, biases (those of experts too) and attention sinks come with
  `--parameters all`.
- `exact` needs no knowledge of attention. A token's gradient reaches only the experts that it is routed to. Forward
  mode runs experts one after another, as grouped kernels have no forward-mode rule; central difference takes a third
  pass, which finds the experts of every token, and holds them: a step that moved a token to another expert would
  measure a jump.
- `value_propagation`, the Fisher and `--positions response` are made of one input and one output per position, which
  experts and linear attention do not have. Only scored layers count: `last-layers:1` works where the last layer is
  dense (a Llama-4 with such a last layer is among the tests).
- Qwen3-Next: its linear attention computes in float32 whatever the model's precision, and values carry its rounding
  (1e-5 to 2e-4 of the largest, by the weights). With its formula in float64 they agree to 1e-5.
- `--parameters pattern:REGEX` takes those of `all-linear` in whose names the regular expression is found. One that
  finds nothing, or something else (a norm, a bias, the embedding), is an error that names it.
- A weight of a kind that is not in this table is an error that names it.
"""


def cells(architecture: str) -> dict[str, str]:
    """Column to "yes" or the reason why not."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(architecture).save_pretrained(folder)
        scoring = load_model(folder, "float32")
    batch = make_batch(*random_rows(seed=0, count=1, longest=8))
    direction = {name: torch.ones_like(p) for name, p in scored_parameters(scoring.model, "all-linear").items()}
    step = RELATIVE_STEPS[2]
    attempts: list[Callable] = [
        lambda: Exact(scoring, "all-linear", direction, method="forward")(batch),
        lambda: Exact(scoring, "all-linear", direction, None, "central", step)(batch),
        lambda: ValuePropagation(scoring, "all-linear", direction)(batch),
        lambda: mean_gradient(scoring, [batch], GradientOptions()),
        lambda: diagonal_fisher(scoring, [batch], "all-linear"),
    ]
    return dict(zip(COLUMNS, map(_outcome, attempts), strict=True))


def _outcome(attempt: Callable) -> str:
    try:
        attempt()
    except UserError as error:
        return f"no: {_reason(str(error))}"
    return "yes"


def _reason(message: str) -> str:
    """The first clause of an error, each kind of module once."""
    found = re.findall(r"([\w.]+\.(?:layers|h)\.\d+\.)([\w.]+) of shape \([^)]*\) in (\w+)", message)
    if found:
        return "not a linear layer: " + ", ".join(dict.fromkeys(f"`{name}` ({module})" for _, name, module in found))
    clause = re.split(r";|: use", message)[0]
    return re.sub(r"\b\w+\.(?:layers|h)\.\d+\.([\w.]+)", r"`\1`", clause)


def page() -> str:
    table = {name: cells(architecture) for architecture, name in NAMES.items()}
    rows = "\n".join(f"| {name} | {' | '.join(found.values())} |" for name, found in table.items())
    return TEXT.format(columns=" | ".join(COLUMNS), rules=" --- |" * len(COLUMNS), rows=rows)


assert NAMES.keys() == (ARCHITECTURES | MORE_ARCHITECTURES).keys()

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
