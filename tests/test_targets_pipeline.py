"""Several targets, and adapters, through the jobs on a real local Ray."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_adapters import write_adapter
from test_score_pipeline import write_rows

from alphatoken import storage, tensor_file
from alphatoken.config import DirectionConfig, ScoreConfig
from alphatoken.errors import UserError
from alphatoken.mask_config import MaskConfig
from alphatoken.masking import flat
from alphatoken.model import load_model
from alphatoken.pair_masking import branch_table
from alphatoken.scoring import build_estimator, score_columns
from pipelines.direction import run_direction
from pipelines.mask import run_mask
from pipelines.score import run_score

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    names = {"data": (12, 0), "math": (4, 1), "code": (3, 2)}
    return {name: str(write_rows(folder / f"{name}.jsonl", rows, seed)) for name, (rows, seed) in names.items()}


def configuration(checkpoint: str, files: dict, output, **changes) -> ScoreConfig:
    validation = [f"math={files['math']}", f"code={files['code']}"]
    settings = {"model": checkpoint, "data": [files["data"]], "validation": validation, "output": str(output)}
    return ScoreConfig(**(settings | changes))


@pytest.fixture(scope="module")
def scored(tiny_checkpoint, files, tmp_path_factory):
    config = configuration(tiny_checkpoint, files, tmp_path_factory.mktemp("runs") / "scored")
    return config, run_score(config)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, files, tmp_path_factory):
    """The folder of an ordinary run with the first target."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    run_score(configuration(tiny_checkpoint, files, output, validation=[files["math"]]))
    return str(output)


def whole(folder: str) -> pa.Table:
    return pa.concat_tables(storage.read_table(shard) for shard in storage.list_shards(folder)).sort_by("row_id")


def test_columns_are_those_of_each_target_alone(scored, alone):
    config, manifest = scored
    assert manifest["targets"] == ["code", "math"] and "targets" not in storage.read_json(f"{alone}/manifest.json")
    found, expected = whole(config.output), whole(alone)
    own, other = flat(found, "adaptation.math"), flat(expected, "adaptation")
    assert np.abs(own - other).max() <= 1e-6 * np.abs(other).max() > 0
    total = own.astype(np.float64) + flat(found, "adaptation.code")
    np.testing.assert_allclose(flat(found, "adaptation"), total, rtol=1e-5, atol=1e-6 * np.abs(total).max())
    assert set(found.column_names) - set(expected.column_names) == {
        "adaptation.math", "adaptation.code", "mean_adaptation.math", "mean_adaptation.code",
    }  # fmt: skip
    health = manifest["direction_health"]
    assert health["targets"].keys() == {"math", "code"}
    assert all(sentence.startswith(("math: ", "code: ")) for sentence in health["concerns"])
    words, of_math = (folder["loss_profile"]["classes"]["words"]["tokens"]
                      for folder in (manifest, storage.read_json(f"{alone}/manifest.json")))  # fmt: skip
    assert words > of_math > 0  # of both targets together
    card = storage.read_bytes(f"{config.output}/README.md").decode()
    assert "adaptation for the target `math` alone" in card


def test_resuming_knows_the_targets(scored, files):
    config, first = scored
    assert run_score(config) == first
    for validation in ([files["math"]], [f"maths={files['math']}", f"code={files['code']}"], [f"math={files['math']}"]):
        with pytest.raises(UserError, match="validation"):
            run_score(config.model_copy(update={"validation": validation}))


def test_masks_of_weighted_targets(scored, alone, tmp_path):
    folder = scored[0].output
    weights = {"math": 1.0, "code": 0.0}
    for settings in ({"drop_sequences": 0.2}, {"scope": "dataset"}):
        output, plain = (str(tmp_path / f"{which}-{next(iter(settings))}") for which in ("weighted", "alone"))
        config = MaskConfig(input=folder, output=output, target_weights=weights, keep_fraction=0.5, **settings)
        result = run_mask(config)
        run_mask(MaskConfig(input=alone, output=plain, keep_fraction=0.5, **settings))
        found, expected = whole(output), whole(plain)
        assert found["labels"].to_pylist() == expected["labels"].to_pylist()
        np.testing.assert_allclose(flat(found, "adaptation"), flat(found, "adaptation.math"), rtol=1e-6)
        np.testing.assert_allclose(flat(found, "value"), flat(found, "adaptation"), rtol=1e-6)
    assert run_mask(config) == result
    with pytest.raises(UserError, match="target_weights"):
        run_mask(config.model_copy(update={"target_weights": {"math": 1.0, "code": 0.5}}))
    with pytest.raises(UserError, match="no such target; it has code, math"):
        run_mask(MaskConfig(input=folder, output=str(tmp_path / "x"), target_weights={"prose": 1.0}))
    with pytest.raises(UserError, match="one target without a name"):
        run_mask(MaskConfig(input=alone, output=str(tmp_path / "x"), target_weights=weights))


def test_a_direction_file_has_all_targets(scored, tiny_checkpoint, files, tmp_path):
    """Made beforehand, it gives the values of a run that makes its own; here of pairs, whose branches are rows."""
    path = str(tmp_path / "direction.safetensors")
    given = [f"math={files['math']}", f"code={files['code']}"]
    about = run_direction(DirectionConfig(model=tiny_checkpoint, validation=given, output=path))
    assert about["num_rows"] == 7 and about["options"]["targets"]["code"]["num_rows"] == 3
    made, own = (tensor_file.load(p, "direction").groups() for p in (path, f"{scored[0].output}/direction.safetensors"))
    assert made.keys() == own.keys() == {"math", "code"}
    for name, tensors in own.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(made[name][key], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max()))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "the sum is", "chosen": " seven plus nine", "rejected": " red beans per hour"}\n' * 3)
    folder = str(tmp_path / "pairs")
    manifest = run_score(
        configuration(tiny_checkpoint, files, folder, data=[str(pairs)], validation=[], direction=path)
    )
    assert manifest["pairs"] and manifest["targets"] == ["code", "math"]
    weights = {"math": 0.0, "code": 2.0}
    run_mask(MaskConfig(input=folder, output=str(tmp_path / "masked"), target_weights=weights, scope="dataset"))
    before, after = whole(folder), whole(str(tmp_path / "masked"))
    for branch in ("chosen", "rejected"):
        own = 2 * flat(before, f"{branch}_adaptation.code")
        assert np.abs(own).max() > 0
        np.testing.assert_allclose(flat(branch_table(after, branch), "adaptation"), own, rtol=1e-6)
        np.testing.assert_allclose(flat(after, f"{branch}_value"), own, rtol=1e-6)


def test_an_adapter_folder_is_scored(tiny_checkpoint, files, tmp_path):
    adapter = write_adapter(tmp_path, base=tiny_checkpoint)
    output = str(tmp_path / "scored")
    config = configuration(adapter, files, output, validation=[files["math"]], parameters="lora", method="forward")
    manifest = run_score(config)
    assert manifest["parameters"] == "lora" and manifest["counts"]["rows_out"] == 12
    estimator = build_estimator(config, load_model(adapter), f"{output}/direction.safetensors")
    for row in whole(output).to_pylist()[:3]:
        ids, mask = np.array(row["input_ids"]), np.array(row["response_mask"])
        expected = score_columns([ids], [mask], [0], estimator, 4096, torch.device("cpu")).flat["adaptation"]
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(row["adaptation"], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(UserError, match="LoRA adapter"):
        run_score(configuration(tiny_checkpoint, files, tmp_path / "base", parameters="lora"))
