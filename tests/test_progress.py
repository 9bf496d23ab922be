"""The progress bar: drawn on terminals alone, with rate and remaining time; counting rows for it."""

import gzip
import io
import json
import time

import pyarrow as pa
import pytest
from rich.console import Console

from alphatoken import row_count, storage
from alphatoken.row_count import count_rows
from alphatoken.train_config import TrainConfig
from jobs import progress
from jobs.progress import progress_bar, rate
from jobs.train import training_bar


def screen(monkeypatch, terminal: bool, clock=time.monotonic) -> io.StringIO:
    """What stderr is."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, color_system=None, get_time=clock)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return file


def test_a_terminal_gets_a_bar(monkeypatch):
    now = [0.0]
    file = screen(monkeypatch, True, lambda: now[0])
    with progress_bar("rows") as bar:
        for done in (0, 50, 100):
            bar.update("scored", done, 400)
            now[0] += 10.0
        bar.print("step 1  [loss] 2")
        bar._progress.refresh()
        assert bar.drawn
    shown = file.getvalue()
    assert "100 of 400" in shown and "left" in shown and "step 1  [loss] 2" in shown
    assert "5.0 rows/s" in shown and "0:01:00" in shown  # 300 rows are left, five a second


def test_elsewhere_there_are_lines_alone(monkeypatch):
    file = screen(monkeypatch, False)
    with progress_bar("rows") as bar:
        bar.update("scored", 1, 2)
        bar.print("step 1")
        assert not bar.drawn
    assert file.getvalue().strip() == "step 1"


def test_a_new_phase_counts_from_its_beginning(monkeypatch):
    screen(monkeypatch, True)
    with progress_bar("prompts") as bar:
        bar.update("samples", 10, 10)
        bar.update("gradients", 4, 10)
        [task] = bar._progress.tasks
        assert (task.completed, task.total, task.description) == (4, 10, "gradients")


@pytest.mark.parametrize(
    "speed, text",
    [(None, ""), (0.0, ""), (1234.5, "1,234 rows/s"), (2.25, "2.2 rows/s"), (0.25, "4.0 s/row")],
)
def test_rates(speed, text):
    assert rate(speed, "rows") == text


def test_rows_are_counted(tmp_path, monkeypatch):
    lines = [json.dumps({"messages": [], "n": n}) for n in range(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # the last line has no end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines[:3]) + "\n").encode()))
    storage.write_table(pa.table({"n": list(range(5))}), str(tmp_path / "c.parquet"))
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert count_rows(sources) == 15 and count_rows(sources, most=4) == 11
    monkeypatch.setattr(row_count, "CHEAP_BYTES", 10)
    assert count_rows(sources) is None and count_rows(sources[2:]) == 5


def test_a_line_of_training_says_something(monkeypatch):
    file = screen(monkeypatch, False)
    with training_bar(TrainConfig(data=["d"], model="m", output="o", max_steps=1)) as told:
        told({"step": 1, "epoch": 0.5, "loss": 2.0, "grad_norm": None})
        told({"step": 1, "epoch": 0.5, "train_loss": 2.0, "train_runtime": 3.0})  # totals: the table has them
    assert file.getvalue().splitlines() == ["step 1 (epoch 0.50)  loss 2  grad_norm not finite"]
