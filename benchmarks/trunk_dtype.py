"""How far values move where the layers below the scored ones take fewer bits (`--trunk-dtype`).

    pip install "alphatoken[quantize]"
    python benchmarks/trunk_dtype.py [--rows 48] [--parameters last-layers:3] [--json FILE]

Values the same rows with every trunk, each along a direction of its own, and compares the adaptation of every response
token with float32's: rank correlation, and the share of the lowest fifth that both name. The control is bfloat16
throughout, which is what a GPU scores in anyway. Bytes are of the trunk's linear layers, seconds of valuing alone.
"""

import time
from typing import Any

import torch
from common import encoded_rows, print_table, rows_parser, write_result
from fidelity import batches_of
from scipy.stats import spearmanr
from torch import nn

from alphatoken.architecture import decoder_layers, first_scored_layer
from alphatoken.batching import Batch
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.model import ScoringModel, load_model
from alphatoken.quantized_trunk import QuantizedTrunk
from alphatoken.value_propagation import ValuePropagation

TRUNKS = {  # dtype, dtype of the trunk
    "float32": ("float32", None),
    "bfloat16 throughout": ("bfloat16", None),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
}
WORST = 0.2


def estimators(scoring: ScoringModel, parameters: str, validation: list[Batch]) -> dict[str, Any]:
    """Along the mean gradient of the validation tokens."""
    exact = mean_gradient(scoring, validation, GradientOptions(parameters)).tensors
    response = mean_gradient(scoring, validation, GradientOptions(parameters, positions="response")).tensors
    return {
        "exact": Exact(scoring, parameters, exact, method="forward"),
        "value_propagation": ValuePropagation(scoring, parameters, response),
    }


def stored_bytes(weight: torch.Tensor) -> int:
    """Of a weight, or of the tensors that a quantised one is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.numel() * weight.element_size()
    return sum(stored_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])


def trunk_bytes(scoring: ScoringModel, parameters: str) -> int:
    """Of the weights of all linear layers below the scored ones."""
    trunk = decoder_layers(scoring.model)[: first_scored_layer(scoring.model, parameters)]
    return sum(stored_bytes(module.weight.data) for module in trunk.modules() if isinstance(module, nn.Linear))


def compare(values: torch.Tensor, plain: torch.Tensor) -> dict[str, float]:
    """Of the same tokens."""
    count = round(WORST * len(plain))
    worst, named = (set(x.topk(count, largest=False).indices.tolist()) for x in (plain, values))
    return {
        "rank_correlation": float(spearmanr(values, plain).statistic),
        "worst_fifth_shared": len(worst & named) / count,
    }


def main() -> None:
    parser = rows_parser(__doc__)
    parser.add_argument("--parameters", default="last-layers:3")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    batches = batches_of(encoded_rows(arguments.model, [arguments.data])[: arguments.rows])
    validation = batches_of(encoded_rows(arguments.model, [arguments.validation]))
    results: dict[str, dict] = {}
    plain: dict[str, torch.Tensor] = {}
    for trunk, (dtype, trunk_dtype) in TRUNKS.items():
        quantized = QuantizedTrunk.of(trunk_dtype, arguments.parameters)
        scoring = load_model(arguments.model, dtype, torch.device("cpu"), trunk=quantized)
        for name, estimator in estimators(scoring, arguments.parameters, validation).items():
            started = time.perf_counter()
            values = torch.cat([estimator(batch).adaptation.float() for batch in batches])
            seconds = time.perf_counter() - started
            results[f"{name}, {trunk}"] = compare(values, plain.setdefault(name, values)) | {
                "tokens": len(values),
                "trunk_mb": trunk_bytes(scoring, arguments.parameters) / 1e6,
                "seconds": seconds,
            }
    print_table(
        f"{arguments.rows} rows, --parameters {arguments.parameters}",
        ["", "rank correlation with float32", "worst fifth shared", "MB of the trunk", "seconds"],
        [
            [
                name, f"{line['rank_correlation']:.4f}", f"{line['worst_fifth_shared']:.0%}", f"{line['trunk_mb']:.0f}",
                f"{line['seconds']:.1f}",
            ]
            for name, line in results.items()
        ],
    )  # fmt: skip
    settings = {"model": arguments.model, "rows": arguments.rows, "parameters": arguments.parameters}
    write_result(arguments.json, settings | {"results": results})


if __name__ == "__main__":
    main()
