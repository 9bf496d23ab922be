"""prompts -> generate -> pair -> score -> mask -> train, on a real local Ray; the slow test with the real vLLM."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from oracles import token_losses
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alphatoken import schema, storage
from alphatoken.config import EMBEDDED_MODEL, ScoreConfig, embedded_data
from alphatoken.errors import UserError
from alphatoken.generate_config import GenerateConfig, PairConfig
from alphatoken.mask_config import MaskConfig
from alphatoken.pairing import Candidate
from alphatoken.run_folder import RunFolder, differences
from alphatoken.schema import BRANCHES
from alphatoken.train_config import TrainConfig
from pipelines import judges
from pipelines.dry_run import dry_run
from pipelines.engines import ANSWERS
from pipelines.generate import run_generate, write_responses
from pipelines.llm_judge import ask_questions, pair_by_verdicts
from pipelines.mask import run_mask
from pipelines.pair import check_pair, run_pair
from pipelines.pair_shards import read_groups, write_pairs
from pipelines.poison import DIED
from pipelines.score import run_score
from pipelines.train import run_train

pytestmark = pytest.mark.usefixtures("local_ray")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def rows_of(folder) -> list[dict]:
    return [row for shard in storage.list_shards(str(folder)) for row in pq.read_table(shard).to_pylist()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    """Six good prompts, one of them twice under the same id, a broken line, one that is too long."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["two", "three", "four", "five", "red", "blue"]
    ids = ["same", "same", "p2", "p3", "p4", "p5"]
    answers = [*words[:5], "blue boom"]
    lines = [
        json.dumps({"id": name, "prompt": f"What is {word}?", "answer": answer})
        for name, word, answer in zip(ids, words, answers, strict=True)
    ]
    path.write_text("\n".join([*lines[:3], "{bad", *lines[3:], json.dumps({"prompt": "word " * 400})]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def generated(tiny_checkpoint, prompts, tmp_path_factory):
    config = generate_config(tiny_checkpoint, prompts, tmp_path_factory.mktemp("generated") / "responses")
    return config, run_generate(config)


def generate_config(model, prompts, output, **changes) -> GenerateConfig:
    settings = {"engine": "transformers", "samples": 3, "max_new_tokens": 24, "chat": True, "shard_rows": 6}
    settings["stop"] = ["e", " "]  # the random model hardly ever ends its turn
    return GenerateConfig(model=model, prompts=[prompts], output=str(output), **(settings | changes))


def test_every_sample_of_every_prompt_is_there_once(generated):
    config, manifest = generated
    assert dry_run(config)["state"] == "finished"
    rows = rows_of(config.output)
    assert manifest["counts"]["rows_out"] == len(rows) == 18 and manifest["counts"]["prompts"] == 8
    assert manifest["counts"]["rows_quarantined"] == 2
    assert len({row["row_id"] for row in rows}) == 18 and {row["sample"] for row in rows} == {0, 1, 2}
    for shard in storage.list_shards(config.output):
        table = pq.read_table(shard)
        assert table.schema.equals(schema.RESPONSES)
        numbers = [row["row_id"] // 3 for row in table.to_pylist()]
        assert all(numbers.count(number) == 3 for number in numbers)  # a prompt's samples lie together
    assert all(len(row["token_ids"]) == len(row["logprobs"]) > 0 for row in rows)
    reasons = {row["reason"] for row in pq.read_table(f"{config.output}/quarantine").to_pylist()}
    assert any("invalid JSON" in reason for reason in reasons) and any("leave room" in reason for reason in reasons)


@pytest.fixture
def small_blocks(monkeypatch):
    """As if Ray split blocks above a few responses, not above 192 MiB."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 2200)


def test_blocks_that_ray_would_split_stay_whole(generated, small_blocks, tiny_checkpoint, prompts, tmp_path):
    manifest = run_generate(generate_config(tiny_checkpoint, prompts, tmp_path / "out", shard_rows=100))
    assert manifest["counts"] == generated[1]["counts"]
    expected = {row["row_id"]: row["token_ids"] for row in rows_of(generated[0].output)}
    assert len(rows_of(tmp_path / "out")) == len(expected)
    assert {row["row_id"]: row["token_ids"] for row in rows_of(tmp_path / "out")} == expected


def test_a_block_with_a_part_of_a_prompt_is_not_written(tmp_path):
    place = {"carried": json.dumps({"id": "a", "source": "s", "position": 0, "prompt": "p"}), "seed": 0}
    good = {"prompt_ids": [1], "reason": "", "token_ids": [2], "text": "x", "seconds": 0.1, "worker": "w"}
    failed = {"prompt_ids": [1], "reason": "generation failed"}
    refused = {"row_id": 0, "prompt_ids": [], "reason": "the prompt is empty"}
    for rows in ([good], [failed], [{**good, "row_id": 4}]):
        parts = [{"row_id": 3, **place, **row} for row in rows] + [place | refused]
        with pytest.raises(RuntimeError, match="1 of the 3 responses to prompt 1"):
            write_responses(pa.Table.from_pylist(parts, ANSWERS), str(tmp_path), samples=3, model="m")
    assert not list(tmp_path.iterdir())


def test_same_seed_same_samples_and_another_seed_others(generated, tiny_checkpoint, prompts, tmp_path):
    first = {row["row_id"]: row["token_ids"] for row in rows_of(generated[0].output)}
    run_generate(generate_config(tiny_checkpoint, prompts, tmp_path / "again", shard_rows=100, batch_tokens=64))
    assert {row["row_id"]: row["token_ids"] for row in rows_of(tmp_path / "again")} == first
    run_generate(generate_config(tiny_checkpoint, prompts, tmp_path / "other", seed=1))
    assert {row["row_id"]: row["token_ids"] for row in rows_of(tmp_path / "other")} != first


def test_a_run_that_was_cut_off_goes_on(generated, tiny_checkpoint, prompts, tmp_path):
    config = generate_config(tiny_checkpoint, prompts, tmp_path / "cut")
    seen = []

    def stop(counts: dict) -> None:
        seen.append(counts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_generate(config, stop)
    kept = storage.list_shards(config.output)
    times = [Path(shard).stat().st_mtime_ns for shard in kept]
    manifest = run_generate(config)
    assert times == [Path(shard).stat().st_mtime_ns for shard in kept]
    assert manifest["counts"] == generated[1]["counts"]
    expected = {row["row_id"]: row["token_ids"] for row in rows_of(generated[0].output)}
    assert {row["row_id"]: row["token_ids"] for row in rows_of(config.output)} == expected


def pair(source, output, **changes):
    config = PairConfig(input=str(source), output=str(output), **changes)
    manifest = run_pair(config)
    assert dry_run(config)["state"] == "finished"
    return manifest, rows_of(output)


def test_empty_responses_are_no_wrong_ones_and_no_identical_ones(generated, tmp_path):
    rows = rows_of(generated[0].output)[:6]
    for row, text in zip(rows, ["", " ", "", "same", "same ", ""], strict=True):
        row["text"] = text
    shard = str(tmp_path / storage.name_of(storage.list_shards(generated[0].output)[0]))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.RESPONSES), shard)
    groups = read_groups(shard, 3)
    assert [(group.reason, group.empty, group.identical) for group in groups] == [
        ("all responses are empty", 3, 0), (None, 1, 1),
    ]  # fmt: skip
    config = PairConfig(input="i", output=str(tmp_path / "pairs"))
    counts = write_pairs(shard, groups, config, 3, config.output, {})
    assert counts["empty_responses"] == [4] and counts["identical_responses"] == [1]
    [record] = RunFolder(config.output).commits()
    assert record["reasons"] == {"all responses are empty": 1, "fewer than two different responses": 1}


def test_own_verifier_that_raises_sets_its_prompt_aside(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    manifest, rows = pair(generated[0].output, tmp_path / "pairs", verifier="own_verifier:shortest")
    reasons = manifest["counts"]["quarantine_reasons"]
    assert reasons["the verifier raised ValueError: no such unit"] == 1
    assert manifest["counts"]["rows_out"] + sum(reasons.values()) == manifest["counts"]["prompts"]
    for row in rows:
        assert row["chosen_score"] > row["rejected_score"] and len(row["chosen"]) < len(row["rejected"])
    ids = [row["id"] for row in rows]
    assert len({row["row_id"] for row in rows}) == len(ids)  # ids of the data may repeat, row ids do not


@pytest.mark.full
def test_a_verifier_with_other_code_is_another_run(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PairConfig(input=generated[0].output, output=str(tmp_path / "pairs"), verifier="units_of_mine:check")
    identities = []
    for factor in (1, 2):
        Path("units_of_mine.py").write_text(f"def check(response, answer):\n    return {factor} * len(response)\n")
        identities.append(check_pair(config)[1])
    assert list(differences(*identities)) and identities[0]["config"] == identities[1]["config"]
    assert "judge" not in check_pair(config.model_copy(update={"verifier": "number"}))[1]["fingerprints"]


@pytest.mark.full
def test_a_reward_model_with_other_weights_is_another_run(generated, tmp_path):
    name = reward_model(tmp_path / "reward", 1)
    config = PairConfig(
        input=generated[0].output, output=str(tmp_path / "pairs"), judge="reward-model", judge_model=name
    )
    identities = [check_pair(config)[1] for _ in range(2)]
    assert not list(differences(*identities))
    path = Path(name, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert list(differences(identities[0], check_pair(config)[1]))


def test_own_verifier_that_kills_its_process_sets_its_prompt_aside(generated, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    manifest, _ = pair(generated[0].output, tmp_path / "pairs", verifier="own_verifier:deadly")
    reasons = manifest["counts"]["quarantine_reasons"]
    assert [count for reason, count in reasons.items() if reason.startswith(DIED)] == [1]
    assert manifest["counts"]["rows_out"] + sum(reasons.values()) == manifest["counts"]["prompts"]


def test_reference_judge_takes_the_answer_with_its_end_of_turn(generated, tmp_path):
    _, rows = pair(generated[0].output, tmp_path / "pairs", judge="reference")
    assert len(rows) == 6
    tokenizer = byte_level(CHATML)
    for row in rows:
        assert row["chosen_sample"] == -1 and row["rejected_sample"] == 0
        assert tokenizer.decode(row["chosen_ids"]) == row["chosen"] + "<|im_end|>"


def reward_model(folder: Path, labels: int) -> str:
    tokenizer = byte_level(CHATML)
    tiny = tiny_model("llama", vocab_size=len(tokenizer))
    tiny.config.num_labels = labels
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_reward_model_scores_are_those_of_one_row_at_a_time(generated, tmp_path):
    name = reward_model(tmp_path / "reward", 1)
    _, rows = pair(generated[0].output, tmp_path / "pairs", judge="reward-model", judge_model=name, batch_tokens=90)
    tokenizer = byte_level(CHATML)
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    model.config.pad_token_id = tokenizer.eos_token_id
    assert rows
    for row in rows:
        for branch in BRANCHES:
            messages = [*row["messages"], {"role": "assistant", "content": row[branch]}]
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")["input_ids"]
            assert row[f"{branch}_score"] == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-4)


def test_a_conversation_that_the_reward_model_cannot_judge_is_set_aside(tmp_path, monkeypatch):
    """By its template, or for its size."""
    name = reward_model(tmp_path / "reward", 1)
    refusing = "{{ raise_exception('no ' + messages[0]['role']) if messages[0]['role'] == 'system' }}" + CHATML
    Path(name, "chat_template.jinja").write_text(refusing)
    config = PairConfig(input="i", output="o", judge="reward-model", judge_model=name)
    judge = judges.RewardModel(config, 1)
    score = judge._scores

    def small(ids):
        if max(map(len, ids)) > 60:
            raise torch.OutOfMemoryError("out of memory")
        return score(ids)

    monkeypatch.setattr(judge, "_scores", small)
    groups = [
        judges.Group(0, {"messages": [{"role": role, "content": "x"}]}, [Candidate(n, text, [3]) for n in range(2)])
        for role, text in (("system", "a"), ("user", "a" * 90), ("user", "a"))
    ]
    judge(groups)
    assert "no system" in groups[0].reason and "a response has no reward: out of memory" in groups[1].reason
    assert groups[2].reason is None and len(groups[2].scores) == 2


def test_code_of_a_model_runs_only_where_the_user_says_so(generated, tmp_path, monkeypatch):
    """Whatever the manifest of a folder says, which may be somebody else's."""
    trusted = []
    monkeypatch.setattr(judges, "make_encoder", lambda model, options, trust: trusted.append(trust))
    manifest = generated[1] | {"config": generated[1]["config"] | {"trust_remote_code": True}, "chat_template": None}
    for answer in (False, True):
        config = PairConfig(input="i", output="o", judge="reference", trust_remote_code=answer)
        judges.Reference(config, manifest)
    assert trusted == [False, True]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"judge_model": "m"}, "--judge-model: --judge verifier does not use it"),
        (
            {"judge": "reference", "max_pairs": 2, "margin": 1.0},
            "--margin, --max-pairs: --judge reference does not use",
        ),
        (
            {"judge": "reward-model", "judge_model": "m", "judge_template": "t"},
            "--judge-template: --judge reward-model",
        ),
    ],
)
def test_what_a_judge_does_not_use_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        PairConfig(input="a", output="b", **given)


def test_llm_judge_is_asked_in_both_orders(generated, tiny_checkpoint, tmp_path):
    """A random model says neither A nor B, or the same whatever the order: prompts are set aside, none is lost."""
    config = PairConfig(
        input=generated[0].output, output=str(tmp_path / "pairs"), judge="vllm-judge", judge_model=tiny_checkpoint,
        engine="transformers", judge_tokens=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="no pair could be made"):
        run_pair(config)


def test_a_shard_s_questions_to_an_llm_judge_stay_together(
    generated, small_blocks, tiny_checkpoint, tmp_path, monkeypatch
):
    """Also where Ray would split them; each shard is written once, from all verdicts."""
    config = PairConfig(
        input=generated[0].output, output=str(tmp_path / "pairs"), judge="vllm-judge", judge_model=tiny_checkpoint,
        engine="transformers", judge_tokens=2,
    )  # fmt: skip
    seen = []
    with pytest.raises(UserError, match="no pair could be made"):
        run_pair(config, lambda counts: seen.append(counts["prompts"]))
    assert len(seen) == len(storage.list_shards(generated[0].output)) and seen[-1] == 6


def test_a_part_of_a_shard_s_verdicts_is_not_written(generated, tiny_checkpoint, tmp_path):
    config = PairConfig(
        input=generated[0].output, output=str(tmp_path / "pairs"), judge="vllm-judge", judge_model=tiny_checkpoint
    )
    shard = storage.list_shards(generated[0].output)[0]
    asked = ask_questions({"shard": [shard]}, config, 3, 4096).to_pylist()
    for row in asked:
        place = json.loads(row["carried"])
        row["text"] = "A" if place.get("first", 0) < place.get("second", 0) else "B"
    answers = pa.Table.from_pylist(asked, ANSWERS)
    for part in (answers[:4], answers[4:]):
        with pytest.raises(RuntimeError, match=f"of the {len(asked)} rows that the judge was asked"):
            pair_by_verdicts(part, config, 3, config.output)
    assert not Path(config.output).exists()
    assert pair_by_verdicts(answers, config, 3, config.output)["rows_out"][0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": "no_module:check"}, "no_module"),
        ({"judge": "reward-model", "judge_model": "two"}, "has 2 labels"),
        ({"verifier": "exact"}, "no pair could be made: all samples are wrong"),
        ({"input": "nowhere"}, "does not exist or is empty"),
    ],
)
def test_mistakes_in_pairing(generated, tmp_path, changes, message):
    if changes.get("judge_model") == "two":
        changes = changes | {"judge_model": reward_model(tmp_path / "two", 2)}
    with pytest.raises(UserError, match=message):
        pair(changes.pop("input", generated[0].output), tmp_path / "pairs", **changes)


def test_an_unknown_judge():
    with pytest.raises(ValueError, match="there is no such judge; choose one of verifier"):
        PairConfig(input="a", output="b", judge="oracle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"prompt": "question"}}, "has no column question"),
        ({"columns": {"promt": "prompt"}}, "no such column to fill"),
        ({"max_new_tokens": 300}, "leaves no room for a prompt"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"chat_template": "nowhere.jinja"}, "cannot be read"),
    ],
)
def test_mistakes_in_generation(tiny_checkpoint, prompts, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_generate(generate_config(changes.pop("model", tiny_checkpoint), prompts, tmp_path / "out", **changes))


def score_mask_train(model: str, pairs: str, validation: str, folder: Path, **changes):
    scored = run_score(
        ScoreConfig(model=model, data=[pairs], validation=[validation], output=str(folder / "scored"), **changes)
    )
    masked = run_mask(MaskConfig(input=str(folder / "scored"), output=str(folder / "masked"), scope="dataset"))
    trained = run_train(
        TrainConfig(
            objective="dpo", data=str(folder / "masked"), model=model, output=str(folder / "dpo"), max_steps=2,
            per_device_batch_size=2, learning_rate=1e-4, save_steps=10,
        )
    )  # fmt: skip
    return scored, masked, trained


def assert_plain_logprobs(model: str, rows: list[dict]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for row in rows:
        for branch in BRANCHES:
            ids = row["prompt_ids"] + row[f"{branch}_ids"]
            with torch.no_grad():
                expected = -token_losses(plain, ids, [i >= len(row["prompt_ids"]) for i in range(len(ids))]).numpy()
            np.testing.assert_allclose(row[f"{branch}_logprobs"], expected, rtol=0, atol=1e-4)
            assert row[f"ref_{branch}_logps"] == pytest.approx(expected.sum(), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [pytest.param("sft", marks=pytest.mark.full), "dpo"])
def test_pairs_are_scored_masked_and_trained_on(generated, tiny_checkpoint, tmp_path, objective):
    pair(generated[0].output, tmp_path / "pairs", judge="reference")
    validation = tmp_path / "validation.jsonl"
    row = {"prompt": [{"role": "user", "content": "hello"}]}
    row |= {"completion": "the answer"} if objective == "sft" else {"chosen": "the answer", "rejected": "no answer"}
    if objective == "sft":
        row["completion"] = [{"role": "assistant", "content": "the answer"}]
    validation.write_text(json.dumps(row) + "\n")
    scored, masked, trained = score_mask_train(
        tiny_checkpoint, str(tmp_path / "pairs"), str(validation), tmp_path, validation_objective=objective
    )
    assert scored["counts"]["rows_out"] == masked["counts"]["rows_out"] == 6
    assert scored["fingerprints"]["reference_model"] == scored["fingerprints"]["model"]
    assert set(masked["threshold"]) == set(BRANCHES)
    assert trained["stored_reference"] and trained["counts"]["steps"] == 2
    rows = rows_of(tmp_path / "masked")
    assert_plain_logprobs(tiny_checkpoint, rows)
    for found in rows:
        for branch in BRANCHES:
            lengths = {
                len(found[f"{branch}_{name}"]) for name in ("ids", "mask", "value", "adaptation", "ref_logprobs")
            }
            assert len(lengths) == 1 and any(found[f"{branch}_mask"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_vllm
def test_the_whole_chain_with_the_real_vllm(tmp_path):
    """No mock: vLLM samples through ray.data.llm, the number verifier pairs, DPO trains on what is kept."""
    responses = tmp_path / "responses"
    manifest = run_generate(
        GenerateConfig(
            model=EMBEDDED_MODEL, prompts=[str(embedded_data() / "sums_prompts.jsonl")], output=str(responses),
            limit=12, samples=6, max_new_tokens=32, temperature=0.8, engine="vllm", max_length=512,
        )
    )  # fmt: skip
    assert manifest["engine"] == "vllm" and manifest["counts"]["rows_out"] == 72
    rows = rows_of(responses)
    plain = AutoModelForCausalLM.from_pretrained(storage_model(), dtype=torch.float32).eval()
    for row in rows[::24]:
        ids = row["prompt_ids"] + row["token_ids"]
        with torch.no_grad():
            expected = -token_losses(plain, ids, [i >= len(row["prompt_ids"]) for i in range(len(ids))]).numpy()
        np.testing.assert_allclose(row["logprobs"], expected, rtol=0, atol=1e-2)
    paired, _ = pair(responses, tmp_path / "pairs")
    assert paired["counts"]["rows_out"] > 1
    _, masked, trained = score_mask_train(
        EMBEDDED_MODEL, str(tmp_path / "pairs"), str(embedded_data() / "sums_validation.jsonl"), tmp_path,
        parameters="last-layers:2",
    )  # fmt: skip
    assert 0.7 < masked["counts"]["kept_fraction"] < 0.9
    assert trained["counts"]["steps"] == 2 and trained["stored_reference"]
    assert_plain_logprobs(storage_model(), rows_of(tmp_path / "masked")[:3])


def storage_model() -> str:
    from alphatoken.embedded import embedded_model_dir

    return str(embedded_model_dir())
