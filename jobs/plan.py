"""What a score run will cost, before it is paid for: `alphatoken plan --model M --data D --device h100 --price 2.5`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # `python jobs/plan.py` puts jobs/ first on the path; the packages are one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from alphatoken.plan_config import PlanConfig
from jobs import cli

CONFIG = PlanConfig


def main(argv: list[str] | None = None) -> int:
    return cli.run(CONFIG, _plan, argv, show=_show, prog="alphatoken plan")


def _plan(config: PlanConfig) -> dict:
    from alphatoken.plan_score import plan_score
    from alphatoken.sources import plan_units
    from jobs.progress import progress_bar
    from pipelines.score import shard_tokens

    units = plan_units(config.data)
    with progress_bar("rows") as bar:
        return plan_score(config, units, shard_tokens(config.score_config(), units), bar.update if bar.drawn else None)


def _show(config: PlanConfig, plan: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, text in _lines(plan):
        table.add_row(name, text)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for note in plan["notes"]:
        console.print(f"- {note}")
    console.print(f"\n{plan['command']}")


def _lines(plan: dict) -> list[tuple[str, str]]:
    from alphatoken.plan_score import duration

    data, model, memory, flops, time = (plan[name] for name in ("data", "model", "memory", "flops", "time"))
    about = "about " if data["scaled_up"] else ""
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in data["unusable_reasons"].items())
    lengths = ", ".join(f"{name} {length:,}" for name, length in data["lengths"].items())
    scored = f"{model['scored']}, " if model["scored"] else ""
    parts = [
        f"{name} {_gb(memory[name])}"
        for name in ("weights", "reference", "directions", "activations", "logits")
        if memory[name]
    ]
    lines = [
        ("rows", f"{data['rows']:,}"),
        ("unusable rows", f"{about}{data['unusable_rows']:,}" + (f" ({reasons})" if reasons else "")),
        ("tokens", f"{about}{data['tokens']:,}, {about}{data['response_tokens']:,} of them response"),
        ("sequence length", lengths),
        ("truncated", f"{data['truncated_share']:.1%} of the usable rows"),
        ("padding", f"{data['padding_share']:.1%} of computed positions, at --batch-tokens {memory['batch_tokens']}"),
        ("model", f"{model['model']}: {model['parameters']:,} parameters, {model['dtype']}"),
        ("estimator", f"{model['estimator']}, {scored}{model['method']}"),
        ("memory of an actor", f"{_gb(memory['actor'])} of {_gb(memory['device'])} ({', '.join(parts)})"),
    ]
    if memory["making_the_direction"]:
        lines.append(("memory, direction", _gb(memory["making_the_direction"])))
    lines += [
        ("forward pass", f"{flops['forward']:.3g} FLOPs"),
        ("scoring", f"{flops['scoring']:.3g} FLOPs, {flops['scoring_over_forward']:.2f} forward passes"),
    ]
    if flops["direction"]:
        lines.append(("direction", f"{flops['direction']:.3g} FLOPs, on one device"))
    speed = f"{time['utilization']:.0%} of {time['peak_tflops']:.3g} TFLOP/s"
    lines += [
        ("device", f"{time['device']}, {speed}: {time['tokens_per_second_per_actor']:,.0f} tokens/s"),
        ("actors", f"{time['actors']}"),
        ("wall-clock", duration(time["wall_clock_hours"])),
        ("device-hours", f"{time['device_hours']:.3g}"),
    ]
    if time["cost"] is not None:
        lines.append(("cost", f"{time['cost']:,.2f} at {time['price']:g} per device-hour"))
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
