"""A plan against slow, obvious computations: rows one by one, operations as torch counts them, tensors as they are."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, random_rows, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from alphatoken import tensor_file
from alphatoken.architecture import scored_parameters
from alphatoken.attention import QUERY_BLOCK
from alphatoken.baselines import Baseline
from alphatoken.batching import make_batch, plan_batches
from alphatoken.config import EMBEDDED_MODEL, ScoreConfig
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.model import prepare_model
from alphatoken.plan import (
    DEVICES,
    Device,
    Method,
    Work,
    actors_for,
    attended,
    count_work,
    direction_flops,
    forward_flops,
    scoring_flops,
)
from alphatoken.plan_config import DEVICE_NAMES, PlanConfig
from alphatoken.plan_data import Sequences, sequence_encoder, survey_rows
from alphatoken.plan_memory import actor_memory, copies_bytes, direction_memory
from alphatoken.plan_model import meta_model, shape_of
from alphatoken.plan_score import measured_matmul, plan_score
from alphatoken.sources import plan_units
from alphatoken.value_propagation import ValuePropagation
from jobs import cli, main

ROOT = Path(__file__).parents[1]
SPEED = json.loads((ROOT / "docs" / "results" / "speed.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they bring where tensors are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(seed: int, count: int, longest: int = 60) -> list[dict]:
    draw = random.Random(seed)
    return [chat("question " * draw.randint(1, 9), "answer " * draw.randint(1, longest)) for _ in range(count)]


def plan(checkpoint: str, files: list[str], block_tokens: int = 8192, **settings) -> dict:
    config = PlanConfig(model=checkpoint, data=files, **settings)
    return plan_score(config, plan_units(config.data), block_tokens)


# the data


def test_counts_are_those_of_a_loop_over_rows(tiny_checkpoint, tmp_path):
    bad = ["not JSON\n", chat("q", ""), {"messages": "text"}, chat("long " * 300, "answer")]
    rows = [*chats(0, 40), *bad, chat("q", "word " * 400)]
    file = write(tmp_path / "a.jsonl", rows)
    found = plan(tiny_checkpoint, [file], max_length=200, batch_tokens=512)["data"]
    config = PlanConfig(model=tiny_checkpoint, data=[file], max_length=200)
    encode = sequence_encoder(tiny_checkpoint, config, False, False)
    lengths, responses, truncated = [], [], 0
    for row in rows:
        if row in bad:
            continue
        sequences = encode(row)
        lengths.append(sequences.lengths[0])
        responses.append(sequences.responses[0])
        truncated += sequences.truncated
    assert len(lengths) == 41 and truncated == 1 and not found["scaled_up"]
    assert found["rows"] == 45 and found["unusable_rows"] == 4
    assert found["unusable_rows"] == sum(found["unusable_reasons"].values())
    assert any("invalid JSON" in reason for reason in found["unusable_reasons"])
    assert (found["tokens"], found["response_tokens"]) == (sum(lengths), sum(responses))
    assert found["truncated_share"] == 1 / 41
    ordered = sorted(lengths)
    expected = {f"p{share}": ordered[int(np.ceil(share / 100 * 41)) - 1] for share in (50, 90, 99)}
    assert found["lengths"] == expected | {"max": max(lengths)}


def test_reasons_that_differ_in_numbers_are_one(tiny_checkpoint, tmp_path):
    rows = [chat("q", "word " * count) for count in (5, 300, 400, 500)]
    found = plan(tiny_checkpoint, [write(tmp_path / "a.jsonl", rows)], max_length=100, too_long="quarantine")["data"]
    assert list(found["unusable_reasons"].values()) == [3]


def test_a_sample_is_scaled_up(tiny_checkpoint, tmp_path):
    first, second = chats(1, 300, longest=20), chats(2, 900)
    files = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    whole = plan(tiny_checkpoint, files)
    part = plan(tiny_checkpoint, files, sample_rows=400)
    assert not whole["data"]["scaled_up"] and part["data"]["scaled_up"]
    assert part["data"]["encoded_rows"] == 400 and part["data"]["rows"] == 1200
    assert any("scaled up from 400 of 1200 rows" in note for note in part["notes"])
    for names in (("data", "tokens"), ("data", "response_tokens"), ("flops", "scoring"), ("time", "device_hours")):
        assert part[names[0]][names[1]] == pytest.approx(whole[names[0]][names[1]], rel=0.1)


def test_each_row_is_as_likely_in_the_sample(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", [{"n": n}] * count) for n, count in (("a", 100), ("b", 300))]
    seen = []

    def encode(row: dict) -> Sequences:
        seen.append(row["n"])
        return Sequences([1], [1], [1], False)

    found = survey_rows(plan_units(files), encode, 200)
    assert (found.rows, found.sampled, found.largest_unit) == (400, 200, 300)
    assert seen == sorted(seen) and 35 <= seen.count("a") <= 65


def test_padding_by_hand():
    # 3 and 5 share a batch, since 3 alone is below a sixteenth of 160; 100 would make it 300 computed positions
    work = count_work([100, 3, 5], [1, 1, 1], batch_tokens=160, block_tokens=10**6)
    assert (work.batches, work.tokens, work.positions) == (2, 108, 110)
    assert work.padding_share == pytest.approx(2 / 110)
    assert (work.largest_positions, work.largest_responses) == (100, 2)
    assert work.pairs == 2 * 5**2 + 100**2
    apart = count_work([100, 3, 5], [1, 1, 1], batch_tokens=160, block_tokens=1)  # each row is a shard of its own
    assert (apart.batches, apart.padding_share) == (3, 0)


def test_work_is_that_of_the_batches():
    ids, masks = random_rows(seed=5, count=60, longest=40)
    lengths, responses = [len(row) for row in ids], [sum(mask) for mask in masks]
    spans = [len(mask) - mask[::-1].index(True) - mask.index(True) for mask in masks]
    work = count_work(lengths, responses, batch_tokens=128, block_tokens=10**6, spans=spans)
    batches = [
        make_batch([ids[i] for i in rows], [masks[i] for i in rows]) for rows in plan_batches(lengths, batch_tokens=128)
    ]
    assert work.batches == len(batches)
    assert work.positions == sum(batch.input_ids.numel() for batch in batches)
    assert work.response_tokens == sum(batch.num_response_tokens for batch in batches)
    assert work.spans == sum(int(batch.span.sum()) for batch in batches)
    assert work.pairs == sum(batch.input_ids.numel() * batch.input_ids.shape[1] for batch in batches)
    assert work.scaled(2.5).positions == 2.5 * work.positions
    assert work.scaled(2.5).largest_positions == max(batch.input_ids.numel() for batch in batches)


@pytest.mark.parametrize("length", [1, QUERY_BLOCK, QUERY_BLOCK + 1, 300])
def test_attended_pairs_by_loop(length):
    starts = [query // QUERY_BLOCK * QUERY_BLOCK for query in range(length)]
    blocks = [(start, min(start + QUERY_BLOCK, length)) for start in starts]
    assert attended(length) == sum(stop for _, stop in blocks)
    assert attended(length, 32) == sum(stop - max(0, start - 32) for start, stop in blocks)


# the model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_parameters_are_those_of_a_real_model(architecture, tmp_path):
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path)
    meta = meta_model(str(tmp_path))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    values = architecture in ARCHITECTURES
    shape = shape_of(meta, values)
    assert shape == shape_of(prepare_model(model).model, values)
    assert shape.parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
    for parameters, first in (("last-layers:1", 3), ("all-linear", 0)):
        method = Method("forward", first)
        assert shape.scored(method) == sum(p.numel() for p in scored_parameters(model, parameters).values())
    assert shape.scored(Method("forward", every_parameter=True)) == shape.parameters


def test_the_embedded_model():
    shape = shape_of(meta_model(EMBEDDED_MODEL), values=True)
    assert (shape.parameters, shape.hidden, shape.vocabulary, len(shape.layers)) == (134_515_008, 576, 49_152, 30)
    assert shape.layers[0].products == 576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536
    assert (shape.layers[0].value_width, shape.layers[0].value_products) == (192, 192 * 576)


# operations


def sdpa_flops(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
    rows, heads, length, width = query_shape
    return 4 * rows * heads * length * key_shape[-2] * width


def sdpa_backward_flops(gradient_shape, *shapes, out_shape=None, **kwargs) -> int:
    return sdpa_flops(*shapes[:3]) * 5 // 2


def half_mm_flops(left_shape, right_shape, *args, out_shape=None, **kwargs) -> int:
    """Of 8-bit floats."""
    return left_shape[0] * left_shape[1] * right_shape[1]


COUNTED = {  # torch counts the GPU's kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flops,
    torch.ops.aten._scaled_mm_v2: half_mm_flops,
}


@pytest.fixture
def quick_search(monkeypatch):
    """Central difference tries two steps only."""
    monkeypatch.setattr("alphatoken.exact.RELATIVE_STEPS", (1e-3, 3e-4))


@pytest.fixture(scope="module")
def wide_model():
    """Wide enough for the first layer's inputs, which formulas count in full, to be a small part."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    return prepare_model(tiny_model("llama", **sizes, num_key_value_heads=1))


def counted(call) -> float:
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "kind, parameters",
    [("plain", "all-linear"), ("value_propagation", "last-layers:1"), ("value_propagation", "all-linear")]
    + [("response direction", "last-layers:1"), ("response direction", "all-linear")]
    + [(kind, set_) for kind in ("central", "forward", "direction") for set_ in ("last-layers:1", "all-linear", "all")],
)
def test_operations_are_those_that_torch_counts(wide_model, quick_search, kind, parameters):
    length = QUERY_BLOCK + 20
    batch = make_batch([[3 + t % 50 for t in range(length)]] * 2, [[t >= length // 2 for t in range(length)]] * 2)
    first = {"last-layers:1": 1}.get(parameters, 0)
    everything = parameters == "all"
    model = shape_of(wide_model.model, values=True)
    work = count_work([length] * 2, [length - length // 2] * 2, 10**6, 10**6)
    directions = {name: p.detach() for name, p in scored_parameters(wide_model.model, parameters).items()}
    of_responses = kind == "response direction"
    kind_of = "forward" if kind.endswith("direction") else kind
    method = Method(kind_of, first, directions=2, every_parameter=everything, response_outer=of_responses)
    if kind.endswith("direction"):
        options = GradientOptions(parameters, positions="response" if of_responses else "all")
        found = counted(lambda: mean_gradient(wide_model, [batch], options))
        expected = direction_flops(model, method, work)
    else:
        if kind == "plain":
            estimator = Baseline(wide_model, "loss")
            left_out = 2 * (work.positions - work.spans) * model.layers[-1].local_products
            assert scoring_flops(model, method, work) == forward_flops(model, work) - left_out
        elif kind == "value_propagation":
            estimator = ValuePropagation(wide_model, parameters, directions, directions)
        else:
            estimator = Exact(wide_model, parameters, directions, directions, kind, central_step=1e-3)
        found = counted(lambda: estimator(batch))
        expected = scoring_flops(model, method, work)
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["plain", "forward"])
def test_a_position_pays_for_its_own_experts(kind):
    scoring = prepare_model(tiny_model("mixtral", num_hidden_layers=2))
    scoring.model.set_experts_implementation("eager")  # torch counts no grouped products
    directions = {name: p.detach() for name, p in scored_parameters(scoring.model, "all-linear").items()}
    estimator = Baseline(scoring, "loss") if kind == "plain" else Exact(scoring, "all-linear", directions, method=kind)
    batch = make_batch([[3 + t % 50 for t in range(64)]], [[t >= 32 for t in range(64)]])
    work, model = count_work([64], [32], 10**6, 10**6), shape_of(scoring.model)
    assert counted(lambda: estimator(batch)) == pytest.approx(scoring_flops(model, Method(kind), work), rel=0.05)
    assert model.scored(Method("forward")) == sum(direction.numel() for direction in directions.values())


@pytest.mark.parametrize("first", [0, 1])
def test_two_of_three_products_count_half_in_8_bit_floats(wide_model, first):
    length = QUERY_BLOCK + 20
    batch = make_batch([[3 + t % 50 for t in range(length)]] * 2, [[t >= length // 2 for t in range(length)]] * 2)
    model, work = shape_of(wide_model.model), count_work([length] * 2, [length - length // 2] * 2, 10**6, 10**6)
    parameters = f"last-layers:{2 - first}"
    direction = {name: p.detach() for name, p in scored_parameters(wide_model.model, parameters).items()}
    estimator = Exact(wide_model, parameters, direction, tangent_dtype="float8")
    expected = scoring_flops(model, Method("forward", first, float8_tangents=True), work)
    assert counted(lambda: estimator(batch)) == pytest.approx(expected, rel=0.03)


def test_other_passes_are_added(wide_model):
    model = shape_of(wide_model.model)
    work = Work(positions=100, pairs=1000, block_pairs=1000, response_tokens=50, spans=60)
    once = scoring_flops(model, Method("plain"), work)
    assert scoring_flops(model, Method("plain"), work, reference=model) == 2 * once
    central = scoring_flops(model, Method("central"), work)
    assert scoring_flops(model, Method("central", plain_passes=1), work) == central + once


MEASURED = {
    "forward pass": Method("plain"),
    "value_propagation, K = 3": Method("value_propagation", 27),
    "exact, K = 3, forward mode": Method("forward", 27),
    "exact, all-linear, forward mode": Method("forward"),
    "exact, K = 3, central difference": Method("central", 27),
    "exact, all-linear, central difference": Method("central"),
}


@pytest.mark.parametrize("result", SPEED["results"], ids=lambda result: result["dtype"])
def test_ratios_and_memory_are_near_the_measured_ones(result):
    rows, length = SPEED["batch_size"], SPEED["length"]
    model = shape_of(meta_model(SPEED["model"]), values=True)
    work = count_work([length] * rows, [length // 2] * rows, 10**6, 10**6)
    assert MEASURED.keys() <= result["methods"].keys() or result["dtype"] == "bfloat16"
    for name, measured in result["methods"].items():
        if name in MEASURED:
            method = MEASURED[name]
            ratio = scoring_flops(model, method, work) / forward_flops(model, work)
            assert ratio == pytest.approx(measured["ratio"], rel=0.35), name
        if name in MEASURED and method.kind != "plain":  # the benchmark's own pass keeps all logits
            memory = actor_memory(model, method, work, result["dtype"], on_cpu=True)
            held = (memory.activations + memory.logits) / 2**20
            assert 0.5 < held / measured["peak_mb"] < 2, name


# memory and time


@pytest.mark.parametrize("parameters, first", [("last-layers:1", 3), ("all-linear", 0), ("all", 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_are_the_tensors_that_an_estimator_keeps(quick_search, parameters, first, dtype):
    scoring = prepare_model(tiny_model("llama", dtype=getattr(torch, dtype)))
    shape, element = shape_of(scoring.model), getattr(torch, dtype).itemsize
    direction, drift = (
        {name: torch.randn(p.shape) for name, p in scored_parameters(scoring.model, parameters).items()}
        for _ in range(2)
    )

    def bytes_of(*groups: dict) -> int:
        return sum(tensor.nbytes for group in groups for tensor in group.values())

    def planned(kind: str, directions: int, **how) -> float:
        method = Method(kind, first, directions, every_parameter=parameters == "all", **how)
        return copies_bytes(shape, method, element)

    if dtype == "float32":
        central = Exact(scoring, parameters, direction, drift, "central", central_step=1e-3)
        kept = [tensors for plus, minus, _ in central.steps.values() for tensors in (plus, minus)]
        assert bytes_of(*kept) == planned("central", 2)
    exact = Exact(scoring, parameters, direction, None, "forward")
    products, others = exact.tangents["adaptation"]
    wide = dict(enumerate(product.stacked for product in products.values()))
    if not (wide and parameters == "all"):  # there a few small tensors stay as they are
        assert bytes_of(wide, others) == planned("forward", 1, wide_tangents=bool(wide))
    products, others = Exact(scoring, parameters, direction, None, tangent_dtype="float8").tangents["adaptation"]
    factors = dict(enumerate(rows for p in products.values() for rows, _ in (p.weight, p.tangent)))
    if parameters != "all":
        assert factors and bytes_of(factors, others) == planned("forward", 1, float8_tangents=True)
    if parameters != "all":
        propagation = ValuePropagation(scoring, parameters, direction, drift)
        assert bytes_of(*propagation.directions.values()) == planned("value_propagation", 2)


def test_memory_grows_with_what_is_kept(wide_model):
    model = shape_of(wide_model.model)
    work = Work(largest_positions=4096, largest_responses=2048)
    one = actor_memory(model, Method("central", 1), work, "float32", on_cpu=False)
    assert one.weights == 4 * model.parameters and one.reference == 0
    assert one.copies == 8 * model.scored(Method("central", 1))
    more = [
        actor_memory(model, Method("central", 1, directions=2), work, "float32", False),
        actor_memory(model, Method("central", 1), work, "float32", False, reference=model, keeps_reference=True),
        actor_memory(model, Method("central", 1), replace(work, largest_positions=8192), "float32", False),
    ]
    assert all(memory.total > one.total for memory in more)
    assert actor_memory(model, Method("central"), work, "float32", False).copies == 2 * one.copies
    graph = direction_memory(model, Method("forward"), work, "bfloat16")
    assert graph > 2 * model.parameters + 12 * model.scored(Method("forward"))


@pytest.mark.parametrize("serial, parallel, wanted", [(0, 10, 10), (0, 10, 3), (1, 10, 3), (2.5, 100, 2.6)])
def test_actors_are_the_fewest_that_finish(serial, parallel, wanted):
    actors = actors_for(serial, parallel, wanted)
    assert serial + parallel / actors <= wanted * (1 + 1e-9)
    assert actors == 1 or serial + parallel / (actors - 1) > wanted
    assert actors_for(3, 1, 3) is None


def test_the_processor_is_measured():
    assert 1e7 < measured_matmul(torch.float32, size=64, seconds=0.01) < 1e14


# whole plans


def test_a_plan_needs_no_weights(tiny_checkpoint, tmp_path):
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = write(tmp_path / "a.jsonl", chats(3, 20))
    found = plan(str(folder), [file], validation=[file], device="a100", price=2.0, num_actors=4, utilization=0.25)
    time, flops = found["time"], found["flops"]
    assert flops["direction"] > 0 and 2.5 < flops["scoring_over_forward"] < 3.5
    assert (found["model"]["method"], found["model"]["dtype"]) == ("forward mode", "bfloat16")
    rate = DEVICES["a100"].bfloat16 * 1e12 * 0.25
    wall_clock = (flops["direction"] + flops["scoring"] / 4) / rate / 3600
    assert time["wall_clock_hours"] == pytest.approx(wall_clock)
    assert time["cost"] == pytest.approx(2.0 * 4 * wall_clock)
    json.dumps(found)


def test_the_command_is_a_score_command(tiny_checkpoint, tmp_path):
    file = write(tmp_path / "with blank.jsonl", [{"q": "question", "a": "word " * n} for n in range(1, 30)])
    found = plan(tiny_checkpoint, [file], columns={"prompt": "q", "completion": "a"}, num_actors=2, window=8,
                 estimator="value_propagation", validation=[file], block_tokens=100_000)  # fmt: skip
    seen = []
    words = shlex.split(found["command"])
    assert words[:2] == ["alphatoken", "score"]
    assert cli.run(ScoreConfig, lambda config: seen.append(config), words[2:]) == 0
    config = seen[0]
    assert (config.model, config.data, config.validation) == (tiny_checkpoint, [file], [file])
    assert config.columns == {"prompt": "q", "completion": "a"} and config.window == 8
    assert (config.num_actors, config.gpus_per_actor, config.estimator) == ("2", 1.0, "value_propagation")
    assert config.batch_tokens <= config.shard_tokens < 100_000  # one shard would leave an actor idle


def test_what_is_missing_is_said(tiny_checkpoint, tmp_path):
    found = plan(tiny_checkpoint, [write(tmp_path / "a.jsonl", chats(4, 5))])
    assert "--validation VALIDATION_FILES" in found["command"]
    assert any("put your validation files" in note for note in found["notes"])
    assert any("assumed, not measured" in note for note in found["notes"])
    baseline = plan(tiny_checkpoint, [str(tmp_path / "a.jsonl")], estimator="loss")
    encode = sequence_encoder(tiny_checkpoint, PlanConfig(model="m", data=["d"]), False, False)
    rows = [encode(row) for row in chats(4, 5)]
    work = count_work(
        [row.lengths[0] for row in rows], [row.responses[0] for row in rows], baseline["memory"]["batch_tokens"], 8192
    )
    model = shape_of(meta_model(tiny_checkpoint))
    expected = scoring_flops(model, Method("plain"), work) / forward_flops(model, work)
    assert "VALIDATION" not in baseline["command"]
    assert baseline["flops"]["scoring_over_forward"] == pytest.approx(expected) and expected < 1


def test_pairs(tiny_checkpoint, tmp_path):
    rows = [{"prompt": "question", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 9)]
    file = write(tmp_path / "a.jsonl", rows)
    found = plan(tiny_checkpoint, [file], device="cpu")
    alone = plan(tiny_checkpoint, [file], device="cpu", objective="dpo", reference_model=tiny_checkpoint)
    assert found["model"]["pairs"] and found["model"]["method"] == "central difference"
    loss = plan(tiny_checkpoint, [file], device="cpu", estimator="loss", batch_tokens=found["memory"]["batch_tokens"])
    ratio = found["flops"]["scoring_over_forward"] / loss["flops"]["scoring_over_forward"]
    assert ratio == pytest.approx(3)  # two moved passes and a plain one
    assert alone["flops"] == found["flops"]  # the model itself as its reference needs no pass
    assert found["data"]["rows"] == 8
    encode = sequence_encoder(tiny_checkpoint, PlanConfig(model="m", data=["d"]), False, True)
    assert found["data"]["tokens"] == sum(sum(encode(row).lengths) for row in rows)


def test_batches_shrink_until_they_fit(tiny_checkpoint, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", chats(5, 200))
    roomy = plan(tiny_checkpoint, [file], device="l4", batch_tokens=8192)
    assert roomy["memory"]["fits"] and roomy["memory"]["batch_tokens"] == 8192
    assert roomy["memory"]["actor"] > roomy["memory"]["weights"] + roomy["memory"]["activations"]
    memory_gb = 0.6 * roomy["memory"]["actor"] / 1e9 / 0.9
    monkeypatch.setitem(DEVICES, "l4", Device(100, 10, memory_gb))
    tight = plan(tiny_checkpoint, [file], device="l4", batch_tokens=8192)
    assert tight["memory"]["fits"] and tight["memory"]["batch_tokens"] < 8192
    assert f"--batch-tokens {tight['memory']['batch_tokens']}" in tight["command"]
    assert any("8192 does not fit" in note for note in tight["notes"])
    monkeypatch.setitem(DEVICES, "l4", Device(100, 10, 1e-6))
    hopeless = plan(tiny_checkpoint, [file], device="l4", batch_tokens=8192)
    assert not hopeless["memory"]["fits"] and hopeless["memory"]["batch_tokens"] == 8192
    assert any(note.startswith("does not fit: an actor") for note in hopeless["notes"])


# the command line


def test_a_fisher_that_is_there_says_what_is_scored(tiny_checkpoint, tmp_path):
    data, path = write(tmp_path / "a.jsonl", chats(4, 5)), str(tmp_path / "fisher.safetensors")
    given = {"fisher": path, "reference_model": tiny_checkpoint}
    assert plan(tiny_checkpoint, [data], **given)["model"]["scored"] == "all-linear"
    about = tensor_file.Provenance("fisher", "m", "last-layers:1", "d", 1, 1, {})
    tensor_file.save(path, tensor_file.TensorFile(about, {}))
    assert plan(tiny_checkpoint, [data], **given)["model"]["scored"] == "last-layers:1"
    with pytest.raises(UserError, match="fisher.safetensors covers --parameters last-layers:1, not all-linear"):
        plan(tiny_checkpoint, [data], parameters="all-linear", **given)


def test_an_adapter_has_no_plan(tiny_checkpoint, tmp_path):
    config = {"base_model_name_or_path": tiny_checkpoint, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    data = write(tmp_path / "a.jsonl", chats(4, 5))
    with pytest.raises(UserError, match=f"a plan is of whole models: give --model {tiny_checkpoint}"):
        plan(str(tmp_path), [data])


def test_tangents_of_8_bit_floats(tiny_checkpoint, tmp_path):
    file = write(tmp_path / "a.jsonl", chats(4, 5))
    plain, float8 = (plan(tiny_checkpoint, [file], tangent_dtype=dtype) for dtype in (None, "float8"))
    assert float8["flops"]["scoring"] < plain["flops"]["scoring"]
    assert "--tangent-dtype float8" in float8["command"]
    for device in ("a100", "cpu"):
        with pytest.raises(UserError, match=f"does not pay on --device {device}.* as h100, h200, b200, l40s, l4 have"):
            plan(tiny_checkpoint, [file], tangent_dtype="float8", device=device)


def test_devices_are_in_the_table():
    assert set(DEVICE_NAMES) == {*DEVICES, "cpu"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_actors": 2, "hours": 1}, "give either --num-actors or --hours"),
        ({"estimator": "excess_loss"}, "excess_loss needs --reference-model"),
        ({"estimator": "value_propagation", "parameters": "all"}, "value_propagation is defined on linear weights"),
        ({"parameters": "q"}, "last-layers:K"),
        ({"fisher": "f"}, "needs both"),
        ({"utilization": 1.5}, "less than or equal to 1"),
        ({"device": "v100"}, "h100"),
    ],
)
def test_settings_that_make_no_run(settings, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        PlanConfig(model="m", data=["d"], **settings)


def test_errors_come_before_rows_are_read(tiny_checkpoint, tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", chats(6, 5))
    other = write(tmp_path / "b.jsonl", [{"text": "no response"}])
    monkeypatch.setattr("alphatoken.plan_score.survey_rows", lambda *args: pytest.fail("rows were read"))
    for files, settings, message in [
        ([file], {"parameters": "last-layers:9"}, "the model has only 4 decoder layers"),
        ([file], {"method": "central"}, "central needs --dtype float32"),
        ([file], {"validation": [other]}, "do not form a known format"),
        ([other], {}, "do not form a known format"),
        ([file], {"direction": str(tmp_path / "none.safetensors")}, "none.safetensors"),
        ([str(tmp_path / "none.jsonl")], {}, "No data file matches"),
    ]:
        with pytest.raises(UserError, match=message):
            plan(tiny_checkpoint, files, **settings)
    with pytest.raises(UserError, match="cannot load"):
        plan(str(tmp_path), [file])


def test_hours_that_are_too_few(tiny_checkpoint, tmp_path):
    file = write(tmp_path / "a.jsonl", chats(7, 5))
    with pytest.raises(UserError, match="one device makes the direction for"):
        plan(tiny_checkpoint, [file], validation=[file], hours=1e-12)
    with pytest.raises(UserError, match="no row can be used: "):
        plan(tiny_checkpoint, [file], max_length=2)


def test_the_command(tiny_checkpoint, tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", chats(8, 20))
    given = ["plan", "--model", tiny_checkpoint, "--data", file, "--device", "h100", "--price", "2.5"]
    assert main.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["rows"] == 20 and found["time"]["cost"] > 0
    hours = found["time"]["scoring_device_hours"]
    assert main.main([*given, "--hours", str(hours / 2.5)]) == 0
    text = capsys.readouterr().out
    assert "memory of an actor" in text and "alphatoken score --model" in text and "--num-actors 3" in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from jobs.main import main; code = main(['plan', '--help']); "
        "loaded = {'torch', 'ray', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--utilization" in done.stdout
