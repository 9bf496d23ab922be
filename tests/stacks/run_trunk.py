"""Values with a quantised trunk, against a plain model with the same rounded weights. Run by test_trunk.py."""

import json
import sys

import torch
from torch.nn import functional as F

from alphatoken.architecture import decoder_layers, scored_parameters
from alphatoken.batching import make_batch
from alphatoken.config import ScoreConfig
from alphatoken.exact import Exact
from alphatoken.model import fingerprint, load_model
from alphatoken.quantized_trunk import QuantizedTrunk
from alphatoken.spread_trunk import SpreadTrunk
from alphatoken.value_propagation import ValuePropagation
from pipelines.score import run_score

SCORED, TRUNKS = "last-layers:2", ("int8", "nf4")


def main(checkpoint: str, data: str, validation: str, output: str) -> None:
    print(json.dumps({dtype: compare(dtype, checkpoint, data, validation, f"{output}-{dtype}") for dtype in TRUNKS}))


def compare(dtype: str, checkpoint: str, data: str, validation: str, output: str) -> dict:
    plain = load_model(checkpoint, "float32")
    trunk, cpu = QuantizedTrunk(dtype, SCORED), torch.device("cpu")
    quantized = load_model(checkpoint, "float32", trunk=trunk)
    spread = load_model(checkpoint, "float32", cpu, trunk=trunk, spread=SpreadTrunk((cpu, cpu), SCORED))
    found = {"same_fingerprint": fingerprint(plain.model) == fingerprint(quantized.model), "kept": 0, "rounded": 0}
    torch.manual_seed(0)
    rows = [torch.randint(5, 60, (length,)).tolist() for length in (9, 30, 17)]
    masks = [[0] * 4 + [1] * (len(row) - 4) for row in rows]
    batch = make_batch(rows, masks, [0, 1, 2])
    names = scored_parameters(plain.model, SCORED)
    direction = {name: torch.randn_like(weight) for name, weight in names.items()}

    def values(model) -> dict[str, torch.Tensor]:
        exact = Exact(model, SCORED, direction, None, "forward")
        propagation = ValuePropagation(model, SCORED, direction)
        return {"exact": exact(batch).adaptation, "propagation": propagation(batch).adaptation}

    unrounded, rounded, apart = values(plain), values(quantized), values(spread)
    found["same_spread"] = all(torch.equal(rounded[name], apart[name]) for name in rounded)
    for ours, theirs in zip(decoder_layers(plain.model), decoder_layers(quantized.model), strict=True):
        for module, other in zip(ours.modules(), theirs.modules(), strict=True):
            if isinstance(module, torch.nn.Linear):
                is_plain = type(other.weight.data) is torch.Tensor
                found["kept" if is_plain else "rounded"] += 1
                eye = torch.eye(module.in_features)
                module.weight.data = other.weight.data if is_plain else F.linear(eye, other.weight).T.contiguous()
    for name, expected in values(plain).items():
        scale = expected.abs().max()
        found[name] = float((rounded[name] - expected).abs().max() / scale)
        found[f"{name}_moved"] = float((unrounded[name] - expected).abs().max() / scale)
    config = ScoreConfig(
        model=checkpoint, data=[data], validation=[validation], output=output, parameters=SCORED, trunk_dtype=dtype
    )
    counts = run_score(config)["counts"]
    return found | {name: counts[name] for name in ("rows_in", "rows_out")}


main(*sys.argv[1:])
