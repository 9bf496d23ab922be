"""A GPU that need not wait for the host: no step of scoring asks for a result before the batch's end.

Without a GPU, what is looked at is which operations are called: those named in WAITS would have the host wait there.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_exact import random_direction
from tiny_models import random_rows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import alphatoken
from alphatoken.batching import make_batch
from alphatoken.device_copies import Fetch, to_device
from alphatoken.exact import Exact
from alphatoken.model import prepare_model
from alphatoken.value_propagation import ValuePropagation

aten = torch.ops.aten
WAITS = {
    aten.nonzero.default, aten._local_scalar_dense.default, aten.masked_select.default, aten.is_nonzero.default,
    aten.equal.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # wait where an index is a mask
OURS = f"{Path(alphatoken.__file__).parent}/"
FOREIGN = "/transformers/"  # looks once, as a forward pass begins, for packed rows; and for experts that have tokens


class Waits(TorchDispatchMode):
    """Counts them by the innermost line of a library or of ours that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if func in WAITS or masks:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS) or FOREIGN in f.filename]
            self.found[f"{frames[-1].filename}:{frames[-1].lineno}"] += 1
        return func(*args, **(kwargs or {}))


def estimators(scoring, parameters):
    direction = random_direction(scoring.model, parameters)
    yield from (Exact(scoring, parameters, direction, method=method) for method in ("forward", "central"))
    yield ValuePropagation(scoring, parameters, direction)


@pytest.mark.parametrize("parameters", ["last-layers:2", "all-linear"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_estimators_never_wait_for_the_device(architecture, parameters):
    scoring = prepare_model(tiny_model(architecture))
    for estimator in estimators(scoring, parameters):
        estimator(make_batch(*random_rows(1, 3)).to(scoring.device))  # looks for a central step, tries kernels
        batch = make_batch(*random_rows(2, 3)).to(scoring.device)
        with Waits() as waits:
            estimator(batch)
        ours = {place: count for place, count in waits.found.items() if FOREIGN not in place}
        assert not ours


def test_a_wait_would_be_found():
    scoring = prepare_model(tiny_model("llama"))
    estimator = Exact(scoring, "last-layers:2", random_direction(scoring.model, "last-layers:2"))
    estimator(make_batch(*random_rows(1, 3)))
    batch = make_batch(*random_rows(2, 3))  # not moved: nobody has looked yet for the places that its mask names
    with Waits() as waits:
        estimator(batch)
    assert {"batching.py"} == {
        place.rpartition("/")[2].partition(":")[0] for place in waits.found if FOREIGN not in place
    }


def moved(device: torch.device) -> None:
    batch = make_batch(*random_rows(3, 4))
    there = batch.to(device)
    for ours, theirs in ((batch.predicting[0], there.predicting[0]), (batch.predicting[1], there.predicting[1]),
                         (batch.targets, there.targets), (batch.span_places, there.span_places)):  # fmt: skip
        assert theirs.device.type == device.type
        torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=0)
    values = torch.randn(3, 50)
    torch.testing.assert_close(Fetch(to_device(values, device) * 2).wait(), values * 2, rtol=0, atol=0)


def test_batches_move_with_their_places():
    moved(torch.device("cpu"))


@pytest.mark.gpu
def test_batches_move_with_their_places_on_a_gpu():
    moved(torch.device("cuda"))
