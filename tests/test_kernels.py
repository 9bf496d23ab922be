"""Triton kernels: each against PyTorch's code, in Triton's interpreter and on a GPU, and when they are used."""

import importlib
import logging

import pytest
import torch
from torch.autograd import forward_ad

from alphatoken import attention, banded_average, contraction, float8, kernel_trial
from alphatoken.attention import AttentionInputs, attend_in_blocks
from alphatoken.banded_average import average_in_blocks
from alphatoken.contraction import bilinear_by_product
from alphatoken.float8 import scaled_in_steps
from tests.stacks.beside import run_beside

HEADS = [(1, 1, 1, 1, 16), (2, 4, 2, 70, 16), (1, 6, 2, 129, 32), (2, 2, 2, 64, 64), (1, 2, 1, 33, 128)]  # B H G T D
BANDS = list(zip(HEADS, (1, 8, 32, 33, 200), strict=True))  # with the window
ROWS = [(1, 16), (70, 100), (3, 1030)]  # N D
LINEARS = [(1, 16, 16), (70, 33, 100), (129, 200, 64), (64, 64, 32)]  # N D_out D_in


def draw(*sizes, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def heads(shape, **how):
    """(query, key, value)."""
    rows, number, groups, length, width = shape
    return draw(*((rows, h, length, width) for h in (number, groups, groups)), **how)


def attend(shape, **how):
    """(a call of the kernel, what it should give)."""
    primal, tangent, scale = heads(shape, **how), heads(shape, **how | {"seed": 9}), shape[-1] ** -0.5
    return ("attention_kernel", "attend", (primal, tangent, scale)), attended_in_blocks(primal, tangent, scale)


def attended_in_blocks(primal, tangent, scale):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, y) for x, y in zip(primal, tangent, strict=True)]
        return [x.clone() for x in forward_ad.unpack_dual(attend_in_blocks(AttentionInputs(*duals, None, scale, None)))]


def average(shape, window, **how):
    query, key, value = heads(shape, **how)
    (delta,) = draw((shape[0], shape[3], 24), **how | {"seed": 9})
    inputs = AttentionInputs(query, key, value, None, 0.3, None)
    return ("band_kernel", "average", (query, key, delta, 0.3, window)), [average_in_blocks(inputs, delta, window)]


def contract(tokens, d_out, d_in, **how):
    given = draw((tokens, d_out), (d_out, d_in), (tokens, d_in), **how)
    return ("contraction_kernel", "contract", given), [bilinear_by_product(*given)]


def in_float8(*sizes, **how):
    (x,) = draw(sizes, **how)
    x[-1] = 0.0
    return ("scaling_kernel", "scale_rows", (x,)), scaled_in_steps(x)


def all_cases(**how):
    return [
        *(attend(shape, **how) for shape in HEADS),
        *(average(shape, window, **how) for shape, window in BANDS),
        *(contract(*sizes, **how) for sizes in LINEARS),
        *(in_float8(*sizes, **how) for sizes in ROWS),
    ]


def check(found, expected, limit):
    found = [found] if isinstance(found, torch.Tensor) else found
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        largest = float(theirs.float().abs().max())
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=limit * largest)


def test_kernels_equal_pytorch_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cases = all_cases()
    torch.save([(f"alphatoken.{module}", name, given) for (module, name, given), _ in cases], tmp_path / "calls")
    assert run_beside("triton", "run_kernels.py", ["calls", "found"], tmp_path) == len(cases)
    for found, (_, expected) in zip(torch.load(tmp_path / "found", weights_only=True), cases, strict=True):
        check(found, expected, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_kernels_equal_pytorch_on_a_gpu(dtype, limit):
    how = {"device": "cuda", "dtype": dtype}
    shape = (2, 8, 2, 2050, 128)
    large = [attend(shape, **how), average(shape, 32, **how), contract(3000, 900, 700, **how)]
    large.append(in_float8(3000, 4112, **how))
    for (module, name, given), expected in [*all_cases(**how), *large]:
        check(getattr(importlib.import_module(f"alphatoken.{module}"), name)(*given), expected, limit)


class Clock:
    """Seconds that pass where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Trial:
    """A stand-in for a kernel on a CPU, and what counts its calls."""

    def __init__(self, monkeypatch, kernel, usual) -> None:
        self.calls, self.kernel, self.usual, self.clock = 0, kernel, usual, Clock()
        monkeypatch.setattr(kernel_trial, "time", self.clock)
        monkeypatch.setattr(kernel_trial, "_verdicts", {})

    def counted(self):
        self.calls += 1
        return self.kernel(self)

    def run(self, kind=(1,)):
        return kernel_trial.run_better("sums", torch.ones(3), kind, self.counted, lambda: self.usual(self))


RIGHT = torch.tensor([1.0, 2.0])


def right(trial):
    return RIGHT.clone()


def slow(trial):
    trial.clock.now += 1.0
    return RIGHT.clone()


def wrong(trial):
    return 1.01 * RIGHT


def broken(trial):
    raise RuntimeError("no such instruction\nmore")


def test_a_faster_kernel_that_agrees_is_used(monkeypatch):
    trial = Trial(monkeypatch, right, slow)
    assert all(torch.equal(trial.run(), RIGHT) for _ in range(2))
    assert trial.calls == 1 + kernel_trial.RUNS + 2  # one trial, and both calls
    trial.run(kind=(2,))
    assert trial.calls == 2 * (1 + kernel_trial.RUNS) + 3  # another kind of shape has its own


@pytest.mark.parametrize(
    "kernel, usual, said", [(slow, right, ""), (wrong, slow, "is wrong here"), (broken, slow, "no such instruction")]
)
def test_a_kernel_that_is_slow_wrong_or_broken_is_not_used(kernel, usual, said, monkeypatch, caplog):
    trial = Trial(monkeypatch, kernel, usual)
    with caplog.at_level(logging.WARNING):
        trial.run()
    tried = trial.calls
    assert torch.equal(trial.run(), RIGHT) and trial.calls == tried
    assert said in caplog.text and (said or not caplog.text)


@pytest.fixture
def offered(monkeypatch):
    """Names of the kernels that are offered work, as if a CPU could run them: PyTorch's code stands in for each."""
    names = []

    def run_better(name, like, kind, kernel, usual):
        names.append(name)
        return usual()

    for module in (attention, banded_average, contraction, float8):
        monkeypatch.setattr(module, "run_better", run_better)
    for module in (attention, contraction, float8):
        monkeypatch.setattr(module, "can_run", lambda *tensors: True)
    return names


def test_each_kernel_is_offered_its_work(offered):
    shape = (1, 2, 1, 40, 16)
    (_, _, (primal, tangent, scale)), expected = attend(shape)
    with forward_ad.dual_level():
        inputs = AttentionInputs(*map(forward_ad.make_dual, primal, tangent), None, scale, None)
        check(forward_ad.unpack_dual(attention._attend_with_tangent(inputs)), expected, 1e-6)
    (_, _, (query, key, delta, scale, window)), expected = average(shape, 8)
    inputs = AttentionInputs(query, key, key, None, scale, None)
    check(banded_average.banded_average(inputs, delta, window), expected, 1e-6)
    (_, _, given), expected = contract(9, 8, 7)
    check(contraction.bilinear(*given), expected, 1e-6)
    (_, _, given), expected = in_float8(9, 32)
    check(float8.scaled_rows(*given), expected, 1e-6)
    assert offered == ["attention and tangent", "banded attention", "contraction", "rows in 8-bit floats"]


@pytest.mark.parametrize("special", [{"softcap": 30.0}, {"mask": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()}])
def test_what_the_kernels_do_not_know_is_left_to_pytorch(special, offered):
    query, key, value = heads((1, 2, 1, 40, 16))
    inputs = AttentionInputs(query, key, value, **{"mask": None, "scaling": 0.25, "softcap": None} | special)
    banded_average.banded_average(inputs, torch.ones(1, 40, 3), 8)
    attention._attend_with_tangent(inputs)
    assert not offered


def test_on_a_cpu_there_is_no_trial():
    assert not kernel_trial.can_run(*heads((1, 2, 1, 40, 16)))
