"""How far values move where the tangents of forward mode have fewer bits (`--tangent-dtype float8`).

    python benchmarks/tangent_dtype.py [--rows 48] [--parameters all-linear] [--json FILE]

Values the same rows along the same direction, and compares the adaptation of every response token with that of forward
mode in float32 throughout: rank correlation, and the share of the lowest fifth that both name. The control is bfloat16
throughout, which is what a GPU scores in anyway. A CPU does the arithmetic of 8-bit floats more slowly than its own, so
nothing is said of time: benchmarks/speed.py measures it on a GPU that has them.
"""


import torch
from common import encoded_rows, print_table, rows_parser, write_result
from fidelity import batches_of
from trunk_dtype import compare

from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.exact import Exact
from alphatoken.model import load_model

CASES = {  # dtype of the model, dtype of the tangents
    "float32": ("float32", None),
    "bfloat16 throughout": ("bfloat16", None),
    "float32, float8 tangents": ("float32", "float8"),
    "bfloat16, float8 tangents": ("bfloat16", "float8"),
}


def main() -> None:
    parser = rows_parser(__doc__)
    parser.add_argument("--parameters", nargs="+", default=["all-linear", "last-layers:3"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    batches = batches_of(encoded_rows(arguments.model, [arguments.data])[: arguments.rows])
    validation = batches_of(encoded_rows(arguments.model, [arguments.validation]))
    scoring = {dtype: load_model(arguments.model, dtype) for dtype in ("float32", "bfloat16")}
    results: dict[str, dict] = {}
    for parameters in arguments.parameters:
        direction = mean_gradient(scoring["float32"], validation, GradientOptions(parameters)).tensors
        plain = None
        for name, (dtype, tangent_dtype) in CASES.items():
            estimator = Exact(scoring[dtype], parameters, direction, method="forward", tangent_dtype=tangent_dtype)
            values = torch.cat([estimator(batch).adaptation.float().cpu() for batch in batches])
            plain = values if plain is None else plain
            results[f"{parameters}, {name}"] = compare(values, plain) | {"tokens": len(values)}
    print_table(
        f"{arguments.rows} rows",
        ["", "rank correlation with float32", "worst fifth shared"],
        [[name, f"{x['rank_correlation']:.4f}", f"{x['worst_fifth_shared']:.0%}"] for name, x in results.items()],
    )
    write_result(arguments.json, {"model": arguments.model, "rows": arguments.rows, "results": results})


if __name__ == "__main__":
    main()
