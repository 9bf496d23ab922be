"""Tables of measured figures, from the JSON that the benchmarks have written: a Sphinx extension.

A page has a comment `<!-- measured: NAME -->` where a table goes, so no figure is copied by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

RESULTS = Path(__file__).resolve().parent / "results"
PLACE = re.compile(r"<!-- measured: ([\w-]+) -->")  # NAME, or NAME-PART

Rows = list[list[str]]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    for name in PLACE.findall(source[0]):
        app.env.note_dependency(str(_file(name)))
    source[0] = PLACE.sub(lambda found: table(found[1]), source[0])


def table(name: str) -> str:
    """The results in NAME.json, or a part of them, as Markdown, with what they were measured on."""
    results = json.loads(_file(name).read_text(encoding="utf-8"))
    head, *rows = TABLES[name](results)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    machine = results["machine"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores ({machine['capability']})"
    note = f"`docs/results/{_file(name).name}`: {where}, torch {machine['torch']}, {machine['date']}."
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}"


def _file(name: str) -> Path:
    return RESULTS / f"{name.partition('-')[0]}.json"


def _speed(results: dict[str, Any]) -> Rows:
    rows = [["T = {length}, batch {batch_size}".format(**results), "dtype", "x forward pass", "MB above the model"]]
    for run in results["results"]:
        for name, found in run["methods"].items():
            rows.append([name, run["dtype"], f"{found['ratio']:.2f}", f"{found['peak_mb']:,.0f}"])
    return rows


def _compiled(results: dict[str, Any]) -> Rows:
    names = list(results["results"][0]["compiled_over_plain"])
    rows = [[f"x the same without, {results['dtype']}", *names, "first calls"]]
    for found in results["results"]:
        ratios = (f"{found['compiled_over_plain'][name]:.2f}" for name in names)
        rows.append([f"T = {found['length']}", *ratios, f"{found['first_calls_s']:.0f} s"])
    return rows


def _trunk_dtype(results: dict[str, Any]) -> Rows:
    rows = [[f"{results['parameters']}, trunk", "rank correlation", "worst fifth shared", "MB of the trunk", "seconds"]]
    for name, found in results["results"].items():
        agreement = [f"{found['rank_correlation']:.3f}", f"{found['worst_fifth_shared']:.0%}"]
        rows.append([name, *agreement, f"{found['trunk_mb']:.0f}", f"{found['seconds']:.0f}"])
    return rows


def _tangent_dtype(results: dict[str, Any]) -> Rows:
    rows = [["what is scored, dtype", "rank correlation", "worst fifth shared"]]
    for name, found in results["results"].items():
        rows.append([name, f"{found['rank_correlation']:.3f}", f"{found['worst_fifth_shared']:.0%}"])
    return rows


def _padding(results: dict[str, Any]) -> Rows:
    rows = [["data", "rows", "longest", "`--batch-tokens`", "shard", "padding", "in shards of 1M tokens", "in order"]]
    for row in results["rows"]:
        counts = (f"{row[name]:,}" for name in ("rows", "longest", "batch_tokens", "shard_tokens"))
        shares = (f"{row[name]:.1%}" for name in ("padding", "padding_large_shard", "padding_in_order"))
        rows.append([row["data"], *counts, *shares])
    return rows


def _speed_table(results: dict[str, Any]) -> Rows:
    rows = [["x forward pass", "measured", "predicted", "tokens/s", "peak memory, x forward pass"]]
    for case in results["cases"]:
        where = f"{case['model']}, {case['dtype']}, T = {case['length']}, batch {case['batch_size']}"
        for name, found in case["methods"].items():
            ratios = [f"{found['ratio']:.2f}", f"{found['predicted']:.2f}"]
            speed = f"{found['tokens_per_second']:,.0f}"
            rows.append([f"{where}: {name}", *ratios, speed, f"{found['peak_ratio']:.1f}"])
    return rows


def _speed_predicted(results: dict[str, Any]) -> Rows:
    shapes = results["predicted"]
    methods = next(iter(shapes.values()))
    rows = [["predicted x forward pass, T = 512", *shapes]]
    return rows + [[name, *(f"{found[name]:.2f}" for found in shapes.values())] for name in methods]


def _growth_length(results: dict[str, Any]) -> Rows:
    rows = [["one row, float32", "T", "s", "ms per token", "peak MB above the model", "KB per token"]]
    for found in results["lengths"]:
        tokens = found["length"]
        speed = [f"{found['seconds']:.2f}", f"{1e3 * found['seconds'] / tokens:.2f}"]
        rows.append([found["method"], str(tokens), *speed, f"{found['peak_mb']:,.0f}",
                     f"{1024 * found['peak_mb'] / tokens:,.0f}"])  # fmt: skip
    return rows


def _growth_validation(results: dict[str, Any]) -> Rows:
    rows = [["validation rows", "scoring a batch, s", "making the direction, s"]]
    for found in results["validation"]:
        seconds = (f"{found['scoring_seconds']:.2f}", f"{found['direction_seconds']:.1f}")
        rows.append([str(found["validation_rows"]), *seconds])
    return rows


def _growth_rows(results: dict[str, Any]) -> Rows:
    rows = [["rows", "actors, one core each", "rows/s"]]
    return rows + [[str(x["rows"]), str(x["actors"]), f"{x['rows_per_second']:.2f}"] for x in results["runs"]]


def _peers(results: dict[str, Any]) -> Rows:
    sizes = "{rows} rows, {queries} queries, T = {length}, float32, all linear weights".format(**results)
    rows = [[sizes, "s", "x forward pass", "peak MB above the model", "largest difference from forward mode"]]
    for name, found in results["results"].items():
        difference = f"{found['largest_difference']:.0e}" if "largest_difference" in found else ""
        rows.append([name, f"{found['seconds']:.1f}", f"{found['x_forward']:.1f}", f"{found['peak_mb']:,.0f}",
                     difference])  # fmt: skip
    return rows


def _in_run_speed(results: dict[str, Any]) -> Rows:
    rows = [[f"batch {results['batch_size']}", "s per step", "x plain SFT"]]
    return rows + [[name, f"{x['total']:.1f}", f"{x['ratio']:.2f}"] for name, x in results["results"].items()]


def _rounds_speed(results: dict[str, Any]) -> Rows:
    plain = results["results"]["plain"]["seconds"]
    run = f"{results['steps']} steps, batch {results['batch_size']}"
    rows = [[run, "training, s", "x plain", "oldest values, steps"]]
    for name, found in results["results"].items():
        rows.append([name, f"{found['seconds']:.0f}", f"{found['seconds'] / plain:.2f}", str(found["oldest_values"])])
    return rows


def _ray_overhead(results: dict[str, Any]) -> Rows:
    return [
        ["", "s"],
        [f"the pipeline, {results['rows']} rows", f"{results['pipeline_seconds']:.0f}"],
        ["a bare loop over the same rows", f"{results['bare_seconds']:.0f}"],
    ]


def _feeding(results: dict[str, Any]) -> Rows:
    rows = [["tokens a second", "ms more for the actor's writes, looks, removals", "idle", "idle, one block at a time"]]
    for found in results["results"]:
        shares = [f"{run['idle'] / (run['idle'] + run['busy']):.1%}" for run in found["runs"].values()]
        rows.append([f"{found['rate']:,.0f}", f"{1000 * found['latency']:.0f}", *shares])
    return rows


def _fidelity(results: dict[str, Any]) -> Rows:
    rows = [[f"estimator, {results['tokens']} tokens", "Spearman", "95% interval"]]
    for found in results["results"]:
        interval = f"{found['low']:.2f} to {found['high']:.2f}"
        rows.append([found["estimator"], f"{found['spearman']:.2f}", interval])
    return rows


def _fidelity_steps(results: dict[str, Any]) -> Rows:
    found = results["results"]
    settings = next(iter(found.values()))
    rows = [["rank correlation with the measured change (95% interval)", *settings]]
    for name, by_setting in found.items():
        rows.append([name, *("{spearman:.2f} ({low:.2f} to {high:.2f})".format(**x) for x in by_setting.values())])
    return rows


def _long_runs(results: dict[str, Any]) -> Rows:
    kinds = ("driver", "largest worker", "workers")
    found = results["results"]
    head = [f"{name}: {what}" for name in found for what in ("rows/s", *(f"{kind}, MB" for kind in kinds))]
    rows = [["tenth of the rows", *head]]
    for number in range(len(next(iter(found.values()))["parts"])):
        cells = []
        for run in found.values():
            part = run["parts"][number]
            cells += [f"{part['rows_per_second']:,.0f}", *(f"{part.get(kind, 0):,.0f}" for kind in kinds)]
        rows.append([str(number + 1), *cells])
    return rows


def _plan_check(results: dict[str, Any]) -> Rows:
    rows = [[f"{results['rows']} rows", "s predicted", "s measured", "GB predicted", "GB measured"]]
    for name, found in results["results"].items():
        for what, line in ((name, found), (f"{name}: its direction", found["direction"])):
            if line:
                sizes = [f"{line[f'{kind}_bytes'] / 1e9:.2f}" for kind in ("predicted", "measured")]
                rows.append([what, f"{line['predicted_seconds']:.1f}", f"{line['measured_seconds']:.1f}", *sizes])
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "speed": _speed,
    "speed_table": _speed_table,
    "speed_table-predicted": _speed_predicted,
    "speed_table_1b": _speed_table,
    "growth-length": _growth_length,
    "growth-validation": _growth_validation,
    "growth-rows": _growth_rows,
    "peers": _peers,
    "padding": _padding,
    "in_run_speed": _in_run_speed,
    "rounds_speed": _rounds_speed,
    "compiled": _compiled,
    "trunk_dtype": _trunk_dtype,
    "tangent_dtype": _tangent_dtype,
    "ray_overhead": _ray_overhead,
    "feeding": _feeding,
    "fidelity": _fidelity,
    "fidelity_steps": _fidelity_steps,
    "long_runs": _long_runs,
    "plan_check": _plan_check,
}
