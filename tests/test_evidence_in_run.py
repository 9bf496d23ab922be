"""benchmarks/evidence: values from the training forward pass are those of a pass of their own."""

from dataclasses import replace

import pytest
from evidence_lab import tiny_study, write_data

from benchmarks.evidence import data
from benchmarks.evidence.grid import FRESH
from benchmarks.evidence.runs import Lab
from benchmarks.evidence.signals import Signal


@pytest.mark.parametrize("estimator", ["exact", "value_propagation"])
def test_a_shared_pass_finds_the_same_masks_and_weights(estimator: str, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data, "TRAINING_ROWS", 16)
    lab = Lab(write_data(tmp_path), tiny_study(tiny_checkpoint, 1e-2))
    signal = Signal(estimator, "last-layers:1", preconditioner="none")
    apart = replace(FRESH, signal=signal, warmup=2, refresh=2, steps=6, in_run=True)
    found = [lab.run("tokens", 0, rule, (6,), 6, False) for rule in (apart, replace(apart, shared=True))]
    assert 0.1 < found[0]["detection"]["dropped"] < 0.5
    assert found[0]["detection"] == found[1]["detection"]
    assert found[0]["target_loss"][6] == pytest.approx(found[1]["target_loss"][6], rel=1e-5)
