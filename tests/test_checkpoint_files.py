"""A checkpoint is known by its files: a run does not go on with another one under the same name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from masked_folder import sft_rows, write_masked, write_model

from alphatoken import storage
from alphatoken.checkpoint_files import BLOCK, BLOCKS, _starts, files_fingerprint, settings_fingerprint
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.fisher_config import FisherConfig
from alphatoken.generate_config import GenerateConfig
from alphatoken.run_folder import RunFolder
from alphatoken.sources import plan_units
from alphatoken.train_config import TrainConfig
from pipelines.direction_identity import direction_identity, direction_run
from pipelines.fisher import fisher_run
from pipelines.generate import PromptPlan, generate_identity
from pipelines.generate import input_fingerprints as of_prompts
from pipelines.score import input_fingerprints
from pipelines.train import train_identity
from pipelines.train_checks import check_train


@pytest.fixture
def model(tmp_path) -> str:
    return write_model(tmp_path / "model")


def test_a_copy_is_the_same_and_what_is_beside_the_model_does_not_count(tmp_path, model):
    before = files_fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("about it")
    (copy / "checkpoint-7").mkdir()
    assert files_fingerprint(str(copy)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_file_of_a_checkpoint_counts(model, name):
    before = files_fingerprint(model)
    path = Path(model, name)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert files_fingerprint(model) != before


def test_of_large_files_blocks_are_read_all_over(tmp_path):
    """Changed a little everywhere, as training does, in a tenth of the file."""
    path = tmp_path / "model.safetensors"
    content = np.zeros(3 * BLOCK * BLOCKS + 5, dtype=np.uint8)
    path.write_bytes(content)
    before = files_fingerprint(str(tmp_path))
    content[len(content) // 2 : len(content) * 6 // 10 : 64] = 1
    path.write_bytes(content)
    assert files_fingerprint(str(tmp_path)) != before
    assert len(_starts(len(content))) in (BLOCKS, BLOCKS + 1)


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, BLOCK * BLOCKS - 1, BLOCK * BLOCKS])
def test_small_files_are_read_whole(size):
    starts = _starts(size)
    assert all(a + BLOCK >= b for a, b in zip(starts, starts[1:], strict=False))
    assert size == 0 or starts[-1] + BLOCK >= size


@pytest.mark.parametrize(
    "name, counts",
    [("config.json", True), ("tokenizer.json", True), ("chat_template.jinja", True), ("model.safetensors", False)],
)
def test_what_weights_do_not_tell_is_part_of_every_run(tmp_path, model, name, counts):
    """A run that is started again with another template or configuration would mix both."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    base = {"model": model, "output": str(tmp_path / "out")}
    score = ScoreConfig(**base, data=[str(rows)], validation=[str(rows)])
    direction = DirectionConfig(**base, validation=[str(rows)])
    fisher = FisherConfig(**base, prompts=[str(rows)], engine="transformers")
    generate = GenerateConfig(**base, prompts=[str(rows)])

    def identities() -> list:
        runs = direction_run(direction, "all-linear", "all", "m", "float32"), fisher_run(fisher, "m", "float32")
        return [input_fingerprints(score), *runs, of_prompts(generate, plan_units(generate.prompts))]

    before = identities()
    path = Path(model, name)
    path.write_bytes(path.read_bytes() + b" ")
    assert all((found != earlier) == counts for found, earlier in zip(identities(), before, strict=True))


def test_where_weights_lie_is_no_setting(model):
    before = settings_fingerprint(model)
    Path(model, "model.safetensors.index.json").write_text("{}")
    assert settings_fingerprint(model) == before != files_fingerprint(model)


@pytest.mark.parametrize("dtype, same", [("auto", False), ("float32", True)])
def test_a_run_does_not_go_on_in_another_dtype(tmp_path, model, dtype, same):
    """auto is another one on a GPU."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    base = {"model": model, "output": str(tmp_path / "out"), "dtype": dtype}

    def dtypes(gpus: int) -> list[str]:
        score = ScoreConfig(**base, data=[str(rows)], estimator="loss", gpus_per_actor=gpus)
        plan = PromptPlan(GenerateConfig(**base, prompts=[str(rows)], gpus_per_replica=gpus), None, 64)
        of_engines = [generate_identity(plan, engine, {})["config"]["dtype"] for engine in ("transformers", "vllm")]
        return [input_fingerprints(score)["dtype"], *of_engines]

    assert all((before == after) == same for before, after in zip(dtypes(0), dtypes(1), strict=True))


def test_no_such_model():
    with pytest.raises(UserError, match="cannot load the configuration of model '/nowhere/at/all'"):
        files_fingerprint("/nowhere/at/all")


@pytest.mark.parametrize("which", ["model", "reference_model"])
def test_training_does_not_go_on_with_another_model_of_the_same_name(tmp_path, model, which):
    reference = write_model(tmp_path / "reference")
    data = write_masked(tmp_path / "masked", sft_rows(4), model)
    config = TrainConfig(data=data, model=model, output=str(tmp_path / "out"))
    config = config.model_copy(update={"reference_model": reference})  # for stability, in-run; here its identity only
    folder = RunFolder(config.output)

    def opened() -> str:
        return folder.open(train_identity(config, check_train(config)))

    assert opened() == "new"
    storage.write_json({}, storage.join(config.output, "manifest.json"))
    assert opened() == "finished"
    write_model(Path(getattr(config, which)), seed=1)
    with pytest.raises(UserError, match=f"holds the output of a different run.*fingerprints.{which}_files"):
        opened()


@pytest.mark.parametrize("changed", ["preconditioner", "reference"])
def test_what_a_score_run_depends_on_by_content(tmp_path, model, changed):
    """Not by name alone: the same command would go on, or be finished, with what is no longer there."""
    reference, rows = write_model(tmp_path / "reference"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    base = {"data": [str(rows)], "model": model, "output": str(tmp_path / "out")}
    own = tmp_path / "moments.jsonl"
    own.write_text(rows.read_text())
    config = {
        "preconditioner": ScoreConfig(
            **base, validation=[str(rows)], preconditioner="adam", preconditioner_data=[str(own)]
        ),
        "reference": ScoreConfig(**base, estimator="excess_loss", reference_model=reference),
    }[changed]
    before = input_fingerprints(config)
    assert input_fingerprints(config) == before
    own.write_text(rows.read_text() * 2)
    write_model(Path(reference), seed=1)
    assert input_fingerprints(config) != before


def test_a_direction_by_pairs_depends_on_the_weights_of_its_reference(tmp_path, model):
    reference = write_model(tmp_path / "reference")
    config = DirectionConfig(
        model=model, output="o", validation=["v"], validation_objective="dpo", reference_model=reference
    )
    before = direction_identity(config, "all")
    write_model(Path(reference), seed=1)
    assert direction_identity(config, "all") != before


def test_an_adapter_counts_with_its_base_model(tmp_path, model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    before = files_fingerprint(str(adapter))
    assert before not in (files_fingerprint(model), None)
    write_model(Path(model), seed=1)
    assert files_fingerprint(str(adapter)) != before
