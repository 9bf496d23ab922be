"""--gpus-per-actor above 1: where layers go, that each is given what it needs there, and that values stay the same."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import relative_error
from tiny_models import random_rows, tiny_model

from alphatoken.architecture import scored_parameters
from alphatoken.batching import make_batch
from alphatoken.config import ScoreConfig
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.model import prepare_model
from alphatoken.spread_trunk import SpreadTrunk, split
from alphatoken.value_propagation import ValuePropagation

CPU = torch.device("cpu")
PARAMETERS = "last-layers:1"


@pytest.mark.parametrize("seed", range(20))
def test_layers_are_shared_out_in_order_and_evenly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, sizes = int(rng.integers(2, 6)), rng.integers(50, 100, int(rng.integers(12, 60))).tolist()
    rest = int(rng.integers(0, sum(sizes) // count))
    numbers = split(sizes, rest, count)
    order = [number or count for number in numbers]  # device 0 has the last ones
    assert order == sorted(order) and set(numbers) >= set(range(1, count))
    loads = [sum(size for size, number in zip(sizes, numbers, strict=True) if number == device)
             for device in range(count)]  # fmt: skip
    loads[0] += rest
    share = (sum(sizes) + rest) / count
    assert max(loads) <= share + count * max(sizes) / 2


def spread_over(model, *devices: torch.device):
    spread = SpreadTrunk(devices, PARAMETERS)
    spread.apply(model, spread.layer_devices(model))
    return model


def direction_of(scoring) -> dict[str, torch.Tensor]:
    """The same random one for the same shapes."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: p.shape for name, p in scored_parameters(scoring.model, PARAMETERS).items()}
    return {name: torch.randn(shape, generator=generator).to(scoring.device) for name, shape in shapes.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_values_are_those_of_one_device(architecture: str) -> None:
    rows = make_batch(*random_rows(seed=1, count=3, longest=20))
    found = []
    for model in (tiny_model(architecture), spread_over(tiny_model(architecture), CPU, CPU)):
        scoring = prepare_model(model)
        direction = direction_of(scoring)
        estimators = [Exact(scoring, PARAMETERS, direction, method=method) for method in ("forward", "central")]
        estimators.append(ValuePropagation(scoring, PARAMETERS, direction))
        found.append([estimator(rows).adaptation for estimator in estimators])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-6


def test_tied_weights_stay_tied() -> None:
    model = spread_over(tiny_model("llama", tie_word_embeddings=True), CPU, CPU)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


FAKE = """
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fake_gpu")  # devices without memory or kernels: shapes and places alone

from alphatoken.architecture import decoder, decoder_layers
from alphatoken.model import prepare_model
from alphatoken.spread_trunk import SpreadTrunk
from tests.tiny_models import tiny_model

devices = tuple(torch.device("fake_gpu", number) for number in range(2))
for architecture in sys.argv[1:]:
    model, mode = prepare_model(tiny_model(architecture, dtype=torch.bfloat16)).model, FakeTensorMode()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))
    with mode:
        spread = SpreadTrunk(devices, "last-layers:1")
        spread.apply(model, spread.layer_devices(model))
        places = {parameter.device for parameter in model.parameters()}
        assert places == set(devices), places
        ids = torch.zeros(2, 9, dtype=torch.long, device=devices[0])
        assert decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.device == devices[0]
        for layer in decoder_layers(model):
            layer._forward_pre_hooks.clear()
        try:
            decoder(model)(input_ids=ids, use_cache=False)
        except Exception as error:
            assert "same device" in str(error), error
        else:
            raise AssertionError("nothing had to be moved")
"""


def test_layers_are_given_what_they_need_on_their_devices() -> None:
    """A pass over tensors that only know where they are: one on another device than its layer's is an error."""
    architectures = ["llama", "gpt2", "gemma2", "mixtral", "phi3"]
    done = subprocess.run([sys.executable, "-c", FAKE, *architectures], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_values_on_two_gpus() -> None:
    rows = make_batch(*random_rows(seed=1, count=3, longest=20))
    found = []
    spread = SpreadTrunk.of(2, PARAMETERS)
    assert spread is not None
    for model in (tiny_model("llama").to("cuda:0"), spread_over(tiny_model("llama"), *spread.devices)):
        scoring = prepare_model(model)
        exact = Exact(scoring, PARAMETERS, direction_of(scoring), method="forward")
        found.append(exact(rows.to(scoring.device)).adaptation)
    assert relative_error(*found) < 1e-4


def test_refusals() -> None:
    assert SpreadTrunk.of(1, PARAMETERS) is None and SpreadTrunk.of(0.5, PARAMETERS) is None
    with pytest.raises(UserError, match="a whole number is needed"):
        SpreadTrunk.of(1.5, PARAMETERS)
    with pytest.raises(UserError, match="64: above one GPU a whole number is needed"):
        SpreadTrunk.of(64, PARAMETERS)
    with pytest.raises(UserError, match="scores the first layer too.*last-layers:K"):
        SpreadTrunk((CPU, CPU), "all-linear").layer_devices(tiny_model("llama"))
    with pytest.raises(ValueError, match="--gpus-per-actor above 1 is for exact and value_propagation"):
        ScoreConfig(model="m", data=["d"], output="o", estimator="loss", gpus_per_actor=2)
