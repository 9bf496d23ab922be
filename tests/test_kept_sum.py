"""Directions and Fisher diagonals whose process dies: what was added up is used again, what kills is put aside.

Without Ray, and without processes: torch does not survive a fork. What a killed run leaves on disk is what one leaves
that an exception ends which nothing catches.
"""

import json
import math
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from alphatoken import tensor_file
from alphatoken.config import DirectionConfig
from alphatoken.errors import UserError
from alphatoken.fisher_config import FisherConfig
from alphatoken.model import load_model
from alphatoken.run_folder import RunFolder
from pipelines import direction, fisher, generate, kept_sum, validation_rows
from pipelines.engines import ANSWERS
from pipelines.poison import DIED, Attempt
from pipelines.refused import quarantine_uri

ROWS = 23


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(validation_rows, "ROWS_IN_MEMORY", 3)
    monkeypatch.setattr(kept_sum, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(kept_sum, "SAVE_SHARE", math.inf)


@pytest.fixture(scope="module")
def scoring(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.fixture
def config(tiny_checkpoint, tmp_path):
    draw = random.Random(3)
    texts = [" it is " * draw.randint(1, 4) + str(i) for i in range(ROWS)]
    lines = [json.dumps({"prompt": f"What is {i}?", "completion": text}) for i, text in enumerate(texts)]
    lines[5] = "{broken"
    (tmp_path / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return DirectionConfig(
        model=tiny_checkpoint, validation=[str(tmp_path / "validation.jsonl")], output=str(tmp_path / "g.safetensors"),
        parameters="last-layers:1", batch_tokens=64,
    )  # fmt: skip


class KilledError(BaseException):
    """Stands for the death of a process: no handler of ours may see it, and nothing is cleaned up."""


def died(run) -> bool:
    """Whether `run` was killed."""
    try:
        run()
    except KilledError:
        return True
    return False


def make(scoring, config, tick=lambda what, more: None) -> dict:
    return direction.make_direction(scoring, config, config.parameters, "all", config.output, tick=tick)


def tensors_of(path: str, kind: str) -> dict[str, torch.Tensor]:
    return tensor_file.load(path, kind).tensors


def same(path: str, expected: str, kind: str, atol: float) -> bool:
    found, expected = tensors_of(path, kind), tensors_of(expected, kind)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=0, atol=atol * scale) for name in expected
    )


class Dying:
    """A tick that kills its process after so many rows, and writes down how many were computed in all processes."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, 10**9

    def __call__(self, what: str, more: float) -> None:
        if what != direction.VALIDATION_ROWS:
            return
        with self.path.open("a") as file:
            file.write(f"{int(more)}\n")
        self.left -= more
        if self.left <= 0:
            raise KilledError


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_direction_goes_on_and_is_the_same(scoring, config, tmp_path, seed):
    draw = random.Random(seed)
    whole = config.model_copy(update={"output": str(tmp_path / "whole.safetensors")})
    make(scoring, whole)
    deaths = 0
    for _ in range(40):
        tick = Dying(tmp_path / "computed.txt")
        tick.left = 10**9 if deaths == 3 else draw.randint(4, 9)
        resumed = kept_rows(config)
        tick.left += resumed  # those are told at once
        if not died(lambda tick=tick: make(scoring, config, tick)):
            break
        deaths += 1
    assert deaths == 3
    # Deaths divide a block into other batches: the same up to rounding.
    assert same(config.output, whole.output, "direction", 1e-6)
    assert tensor_file.read_provenance(config.output, "direction").num_rows == ROWS - 1
    assert not Path(f"{config.output}.parts").exists()
    [broken] = pq.read_table(quarantine_uri(config.output)).to_pylist()
    assert (broken["row_id"], broken["stage"]) == (5, "direction") and "JSON" in broken["reason"]


def kept_rows(config) -> int:
    """Rows that are in the kept sums."""
    uris = sorted(Path(f"{config.output}.parts", "sums").glob("*.safetensors"))
    return sum(tensor_file.read_provenance(str(uri), "sum").num_rows for uri in uris)


def test_finished_blocks_are_not_computed_again(scoring, config, tmp_path):
    log = tmp_path / "computed.txt"
    tick = Dying(log)
    tick.left = 13  # of half 0, with 11 rows, and half 1
    assert died(lambda: make(scoring, config, tick))
    assert kept_rows(config) == 11
    log.unlink()
    make(scoring, config, Dying(log))
    kept, *computed = map(int, log.read_text().split())
    assert kept == 11 and sum(computed) == ROWS - 1 - 11


def test_slow_saving_is_seldom(tmp_path, monkeypatch):
    """Of 60 blocks of a second each, with 20 s for a save: as many are saved as take the share, and one to find out."""
    now, saves = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(kept_sum, "SAVE_SECONDS", 5.0)
    monkeypatch.setattr(kept_sum, "SAVE_SHARE", 0.5)

    def save(path, contents):
        saves.append(now[0])
        now[0] += 20

    def add(examples, so_far):
        now[0] += 1
        return so_far

    monkeypatch.setattr(tensor_file, "save", save)
    folder = kept_sum.open_parts(str(tmp_path / "f"), {"stage": "fisher"}, False)
    sums = kept_sum.KeptSums(folder, 64, torch.device("cpu"))
    sums.over(0, [[(row, row)] for row in range(60)], add, lambda _: 1, lambda *_: None, "rows")
    assert saves == [5.0, 65.0]  # 40 s after the first was written


def test_a_row_that_kills_is_put_aside(scoring, config, tmp_path, monkeypatch):
    deadly = {7, 12}
    others = tmp_path / "others.jsonl"
    lines = Path(config.validation[0]).read_text().splitlines()
    encoded = direction.make_encoder(config.model, config)
    poison = [encoded.encode(json.loads(lines[i])).input_ids for i in deadly]
    others.write_text("\n".join(lines[i] for i in range(ROWS) if i not in deadly | {5}) + "\n")
    clean = config.model_copy(update={"validation": [str(others)], "output": str(tmp_path / "others.safetensors")})
    make(scoring, clean)
    gradient_sum = direction.directions.gradient_sum

    def killing(scoring, batches, *rest):
        batches = list(batches)
        for batch in batches:
            for row, mask in zip(batch.input_ids.tolist(), batch.response_mask.tolist(), strict=True):
                if any(row[: len(ids)] == ids for ids in poison) and any(mask):
                    raise KilledError
        return gradient_sum(scoring, batches, *rest)

    monkeypatch.setattr(direction.directions, "gradient_sum", killing)
    deaths = 0
    while died(lambda: make(scoring, config)):
        deaths += 1
        assert deaths < 20
    monkeypatch.undo()
    assert same(config.output, clean.output, "direction", 1e-6)
    aside = {row["row_id"]: row["reason"] for row in pq.read_table(quarantine_uri(config.output)).to_pylist()}
    assert set(aside) == deadly | {5} and all(aside[row].startswith(DIED) for row in deadly)
    assert tensor_file.read_provenance(config.output, "direction").options["num_refused"] == 3


def test_targets_have_notes_of_their_own(scoring, config, tmp_path, monkeypatch):
    """Row ids of both begin at 0: what was noted of one target's row must not be taken for the other's."""
    both = {f"{name}={config.validation[0]}" for name in ("math", "code")}
    several = config.model_copy(update={"validation": sorted(both)})
    seen: list[str] = []
    monkeypatch.setattr(kept_sum, "Attempt", Noted.into(seen))
    make(scoring, several)
    assert len(seen) == len(set(seen)) > 4


class Noted(Attempt):
    """Keeps the names of its notes."""

    @classmethod
    def into(cls, seen: list[str]) -> type:
        class Seen(cls):
            def parts(self):
                seen.append(self.uri)
                return super().parts()

        return Seen


def test_the_same_command_again_changes_nothing_and_another_is_refused(scoring, config):
    tick = Dying(Path(f"{config.output}.computed"))
    tick.left = 6
    assert died(lambda: make(scoring, config, tick))
    changed = config.model_copy(update={"max_length": 99})
    with pytest.raises(UserError, match=r"different run \(options.max_length: 2048 -> 99\)"):
        make(scoring, changed)
    made = make(scoring, config)
    before = Path(config.output).stat().st_mtime_ns
    assert make(scoring, config) == made | {"already_finished": True}
    assert Path(config.output).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="max_length: 2048 -> 99.*--overwrite"):
        make(scoring, changed)
    make(scoring, changed.model_copy(update={"overwrite": True}))
    assert tensor_file.read_provenance(config.output, "direction").options["max_length"] == 99


def test_a_killed_fisher_goes_on_from_its_samples(scoring, tiny_checkpoint, tmp_path, monkeypatch):
    draw = random.Random(0)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(20)))
    config = FisherConfig(
        model=tiny_checkpoint, prompts=[str(tmp_path / "prompts.jsonl")], output=str(tmp_path / "f.safetensors"),
        parameters="last-layers:1", engine="transformers", batch_tokens=64,
    )  # fmt: skip
    run = fisher.fisher_run(config, generate.fingerprint(scoring.model), "float32")
    whole = config.model_copy(update={"output": str(tmp_path / "whole.safetensors")})
    deadly = 13
    for each in (config, whole):
        folder = kept_sum.open_parts(each.output, {"stage": "fisher", **run}, False)
        for first in range(0, 20, 5):
            draw.seed(first)
            fisher.write_responses(answers(range(first, first + 5), draw), folder.uri, 1, "m", fisher.SAMPLES)
    fisher.make_fisher._function(whole, run, f"{whole.output}.parts", 1)
    fisher_sum = fisher.fisher_sum

    def killing(scoring, batches, parameters, so_far):
        batches = list(batches)
        if any([deadly] * 3 == row[:3] for batch in batches for row in batch.input_ids.tolist()):
            raise KilledError
        return fisher_sum(scoring, batches, parameters, so_far)

    monkeypatch.setattr(fisher, "fisher_sum", killing)
    deaths = 0
    while died(lambda: fisher.make_fisher._function(config, run, f"{config.output}.parts", 1)):
        deaths += 1
        assert deaths < 10
    monkeypatch.undo()
    [aside] = pq.read_table(quarantine_uri(config.output)).to_pylist()
    assert (aside["row_id"], aside["position"], aside["stage"]) == (deadly, deadly, "fisher")
    found, everything = (tensor_file.load(each.output, "fisher") for each in (config, whole))
    assert (found.provenance.num_rows, everything.provenance.num_rows) == (19, 20)
    draw.seed(10)
    [row] = [r for r in answers(range(10, 15), draw).to_pylist() if r["row_id"] == deadly]
    batch = fisher.sampled_batch([(row["prompt_ids"], row["token_ids"])])
    alone = fisher_sum(scoring, [batch], "last-layers:1").tensors
    for name, tensor in alone.items():
        expected = (everything.tensors[f"fisher/{name}"] * 20 - tensor) / 19
        assert torch.allclose(found.tensors[f"fisher/{name}"], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert not RunFolder(f"{config.output}.parts").commits()


def answers(row_ids, draw: random.Random) -> pa.Table:
    """Made-up samples; a row begins with three times its number."""
    carried = {"id": "x", "source": "prompts.jsonl", "prompt": "", "messages": None, "answer": None}
    return pa.Table.from_pylist(
        [
            {"row_id": i, "carried": json.dumps(carried | {"position": i}), "prompt_ids": [i] * 3, "seed": 0,
             "reason": "", "token_ids": draw.choices(range(4, 60), k=draw.randint(2, 9)), "text": "",
             "logprobs": None, "finish_reason": "stop"}
            for i in row_ids
        ],
        schema=ANSWERS,
    )  # fmt: skip
