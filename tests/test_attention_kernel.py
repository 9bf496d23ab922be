"""Attention's tangent in Triton: the kernel against PyTorch's code, and when it is used."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from oracles import relative_error
from torch.autograd import forward_ad

from alphatoken import attention_trial
from alphatoken.attention import AttentionInputs, attend_in_blocks

SHAPES = [(1, 1, 1, 1, 16), (2, 4, 2, 70, 16), (1, 6, 2, 129, 32), (2, 2, 2, 64, 64), (1, 2, 1, 33, 128)]  # B H G T D

INTERPRETED = """
import sys
import torch
from alphatoken.attention_kernel import attend
saved = torch.load(sys.argv[1], weights_only=True)
torch.save([attend(tuple(primal), tuple(tangent), scale) for primal, tangent, scale in saved], sys.argv[2])
"""


def case(shape, device="cpu", dtype=torch.float32, seed=0):
    rows, heads, groups, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, number, length, width) for number in (heads, groups, groups)]
    draw = [[torch.randn(size, generator=generator).to(device, dtype) for size in sizes] for _ in range(2)]
    return *draw, width**-0.5


def by_blocks(primal, tangent, scale):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, y) for x, y in zip(primal, tangent, strict=True)]
        found = forward_ad.unpack_dual(attend_in_blocks(AttentionInputs(*duals, None, scale, None)))
        return found.primal.clone(), found.tangent.clone()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which CPU installations lack")
def test_the_kernel_equals_blocks_in_the_interpreter(tmp_path):
    cases = [case(shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    torch.save(cases, tmp_path / "cases")
    command = [sys.executable, "-c", INTERPRETED, tmp_path / "cases", tmp_path / "found"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for found, given in zip(torch.load(tmp_path / "found", weights_only=True), cases, strict=True):
        for ours, expected in zip(found, by_blocks(*given), strict=True):
            assert relative_error(ours, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_kernel_equals_blocks_on_a_gpu(dtype, limit):
    from alphatoken.attention_kernel import attend

    for shape in (*SHAPES, (2, 8, 2, 2050, 128)):
        given = case(shape, "cuda", dtype)
        for ours, expected in zip(attend(*given), by_blocks(*given), strict=True):
            assert relative_error(ours.float(), expected.float()) < limit


class Clock:
    """Seconds that pass where a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Trial:
    """A stand-in for the kernel on a CPU."""

    def __init__(self, monkeypatch, kernel) -> None:
        self.calls = 0
        monkeypatch.setattr(attention_trial, "time", CLOCK)

        def counted(inputs):
            self.calls += 1
            return kernel(inputs)

        monkeypatch.setattr(attention_trial, "by_kernel", counted)
        monkeypatch.setattr(attention_trial, "_can_run", lambda inputs: True)
        monkeypatch.setattr(attention_trial, "_verdicts", {})

    def run(self, blocks=attend_in_blocks):
        primal, tangent, scale = case((1, 2, 1, 40, 16))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, y) for x, y in zip(primal, tangent, strict=True)]
            inputs = AttentionInputs(*duals, None, scale, None)
            found = forward_ad.unpack_dual(attention_trial.attend_with_tangent(inputs, blocks))
            return found.primal.clone(), found.tangent.clone()


def slowly(inputs):
    CLOCK.now += 1.0
    return attend_in_blocks(inputs)


def wrongly(inputs):
    primal, tangent = forward_ad.unpack_dual(attend_in_blocks(inputs))
    return forward_ad.make_dual(primal, 1.01 * tangent)


def broken(inputs):
    raise RuntimeError("no such instruction\nmore")


def test_a_faster_kernel_that_agrees_is_used(monkeypatch):
    trial = Trial(monkeypatch, attend_in_blocks)
    for _ in range(2):
        for ours, expected in zip(trial.run(slowly), by_blocks(*case((1, 2, 1, 40, 16))), strict=True):
            torch.testing.assert_close(ours, expected)
    assert trial.calls == 1 + attention_trial.RUNS + 2  # one trial, and both calls


@pytest.mark.parametrize(
    "kernel, blocks, said",
    [(slowly, attend_in_blocks, ""), (wrongly, slowly, "is wrong here"), (broken, slowly, "no such instruction")],
)
def test_a_kernel_that_is_slow_wrong_or_broken_is_not_used(kernel, blocks, said, monkeypatch, caplog):
    trial = Trial(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING):
        trial.run(blocks)
    tried = trial.calls
    for ours, expected in zip(trial.run(blocks), by_blocks(*case((1, 2, 1, 40, 16))), strict=True):
        torch.testing.assert_close(ours, expected)
    assert trial.calls == tried
    assert said in caplog.text and (said or not caplog.text)


def test_what_the_kernel_does_not_know_is_left_to_pytorch():
    primal, _, scale = case((1, 2, 1, 40, 16))
    assert not attention_trial._can_run(AttentionInputs(*primal, None, scale, None))  # on a CPU
