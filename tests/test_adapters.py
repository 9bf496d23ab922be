"""LoRA adapters as models: values along the adapter's own factors, and along the weights that it adds to."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from oracles import double, exact_values, relative_error
from oracles import mean_gradient as oracle_gradient
from tiny_models import random_rows, tiny_model
from transformers import AutoModelForCausalLM

from alphatoken import tensor_file
from alphatoken.adapters import base_of, is_adapter
from alphatoken.architecture import first_scored_layer, scored_parameters, scored_weights
from alphatoken.batching import make_batch
from alphatoken.config import ScoreConfig
from alphatoken.direction import GradientOptions, mean_gradient
from alphatoken.errors import UserError
from alphatoken.exact import Exact
from alphatoken.model import fingerprint, load_model, prepare_model
from alphatoken.scoring import build_estimator
from alphatoken.tokenizer import load_config, load_tokenizer
from alphatoken.value_propagation import ValuePropagation

peft = pytest.importorskip("peft")

FORWARD, CENTRAL = 1e-5, 1e-2


def write_adapter(folder: Path, architecture: str = "llama", base: str | None = None, **changes) -> str:
    """An adapter with random factors, B among them, and its base model."""
    if base is None:
        base = str(folder / "base")
        tiny_model(architecture).save_pretrained(base)
    settings = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(settings | changes))
    torch.manual_seed(1)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    adapted.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def change_config(adapter: str, **changes) -> None:
    path = Path(adapter, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    return write_adapter(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("changes", [{"lora_alpha": 80}, {"use_rslora": True}])
def test_what_an_adapter_is_multiplied_by_is_part_of_the_checkpoint(changes, tmp_path):
    folder = write_adapter(tmp_path)
    before = fingerprint(load_model(folder, "float32").model)
    assert fingerprint(load_model(folder, "bfloat16").model) == before
    change_config(folder, **changes)
    assert fingerprint(load_model(folder, "float32").model) != before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_values_along_the_factors_equal_one_backward_per_token(architecture, tmp_path):
    scoring = load_model(write_adapter(tmp_path, architecture), "float32")
    oracle, rows, validation = double(scoring.model), random_rows(3, 3, 20), random_rows(4, 2, 12)
    names = list(scored_parameters(scoring.model, "lora"))
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * len(scored_weights(scoring.model, "all-linear"))
    direction = mean_gradient(scoring, [make_batch(*validation)], GradientOptions("lora")).tensors
    expected = oracle_gradient(oracle, validation, names)
    assert max(relative_error(direction[name], expected[name]) for name in names) < 1e-4
    truth = exact_values(oracle, rows, direction)
    for method, tolerance in (("forward", FORWARD), ("central", CENTRAL)):
        found = Exact(scoring, "lora", direction, method=method)(make_batch(*rows))
        assert relative_error(found.adaptation, truth) < tolerance


def test_a_fresh_adapter_has_values_of_b_alone(tmp_path):
    """B = 0: the gradient of A, s B^T delta h^T, is zero."""
    scoring = load_model(write_adapter(tmp_path, init_lora_weights=True), "float32")
    rows = random_rows(3, 2, 16)
    direction = mean_gradient(scoring, [make_batch(*rows)], GradientOptions("lora")).tensors
    assert all(bool(tensor.any()) == (".lora_B." in name) for name, tensor in direction.items())
    truth = exact_values(double(scoring.model), rows, direction)
    for method, tolerance in (("forward", FORWARD), ("central", CENTRAL)):
        found = Exact(scoring, "lora", direction, method=method)(make_batch(*rows))
        assert relative_error(found.adaptation, truth) < tolerance


def test_layers_without_factors_are_shared(tmp_path):
    adapter = write_adapter(tmp_path, layers_to_transform=[2, 3], target_modules=["q_proj", "v_proj"])
    scoring = load_model(adapter, "float32")
    assert first_scored_layer(scoring.model, "lora") == 2
    assert len(scored_parameters(scoring.model, "lora")) == 2 * 2 * 2
    seen = []
    scoring.model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    rows = random_rows(3, 2, 16)
    direction = mean_gradient(scoring, [make_batch(*rows)], GradientOptions("lora")).tensors
    estimator = Exact(scoring, "lora", direction, method="central")
    truth = exact_values(double(scoring.model), rows, direction)
    seen.clear()
    found = estimator(make_batch(*rows)).adaptation
    assert relative_error(found, truth) < CENTRAL
    assert len(seen) == 1


@pytest.mark.parametrize("estimator", [Exact, ValuePropagation])
def test_other_parameters_are_those_of_the_merged_model(adapter, estimator, tmp_path):
    merged = tmp_path / "merged"
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    adapted.merge_and_unload().save_pretrained(merged)
    rows, batch = random_rows(4, 2, 12), make_batch(*random_rows(3, 3, 20))
    values = []
    for name in (adapter, str(merged)):
        scoring = load_model(name, "float32")
        direction = mean_gradient(scoring, [make_batch(*rows)], GradientOptions("last-layers:2")).tensors
        more = {"method": "forward"} if estimator is Exact else {}
        values.append(estimator(scoring, "last-layers:2", direction, **more)(batch).adaptation)
        names = set(scored_parameters(scoring.model, "all"))
        assert not any("lora" in name for name in names)
    assert relative_error(values[0], values[1]) < 1e-4


def test_two_adapters_are_two_checkpoints(adapter, tmp_path):
    other = write_adapter(tmp_path, base=base_of(adapter), r=2)
    found = {fingerprint(load_model(name, "float32").model) for name in (adapter, other, base_of(adapter))}
    assert len(found) == 3


def test_the_base_model_is_found(adapter, tiny_checkpoint, tmp_path):
    assert is_adapter(adapter) and not is_adapter(base_of(adapter)) and base_of("no/such-model") == "no/such-model"
    here = write_adapter(tmp_path, base=tiny_checkpoint)
    assert base_of(here) == tiny_checkpoint
    assert load_tokenizer(here).get_vocab() == load_tokenizer(tiny_checkpoint).get_vocab()
    with pytest.raises(UserError, match="is a LoRA adapter.*merge it"):
        load_config(here)
    shutil.copytree(tiny_checkpoint, Path(here, "inside"))
    change_config(here, base_model_name_or_path="inside")  # a path as seen from the adapter
    assert load_model(here, "float32").model.config.model_type == "llama"


def test_a_configuration_beside_an_adapter_makes_it_no_model(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    shutil.copy(Path(base_of(adapter), "config.json"), copy)  # as Axolotl leaves it
    assert is_adapter(str(copy)) and base_of(str(copy)) == base_of(adapter)
    assert list(scored_parameters(load_model(str(copy), "float32").model, "lora"))
    for weights in ("model-00001-of-00002.safetensors", "pytorch_model.bin"):
        Path(copy, weights).touch()
        assert not is_adapter(str(copy))  # merged, with a configuration that was left there
        Path(copy, weights).unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/no/such/model"}, "cannot load '/no/such/model', the base model of adapter"),
        ({"r": 5}, "cannot load the adapter"),
    ],
)
def test_what_cannot_be_scored_is_told(changes, message, tmp_path, adapter):
    copy = str(shutil.copytree(adapter, tmp_path / "copy"))
    change_config(copy, **changes)
    with pytest.raises(UserError, match=message):
        load_model(copy, "float32")


def test_factors_elsewhere_are_told(tmp_path):
    adapter = write_adapter(tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="lm_head"):
        load_model(adapter, "float32")


def test_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft: pip install 'alphatoken\[train\]'"):
        load_model(adapter, "float32")


def test_without_an_adapter():
    with pytest.raises(UserError, match="no LoRA adapter"):
        Exact(prepare_model(tiny_model("llama")), "lora", {}, method="forward")


def test_estimators_that_factors_do_not_suit(adapter):
    settings = {"model": adapter, "data": ["d"], "validation": ["v"], "output": "o"}
    with pytest.raises(ValueError, match="value_propagation is defined on linear weights .*, not lora"):
        ScoreConfig(**settings, estimator="value_propagation", parameters="lora")
    with pytest.raises(ValueError, match="lora has no stability"):
        ScoreConfig(**settings, parameters="lora", fisher="f", reference_model="m")


def test_stability_of_an_adapter_is_refused(adapter, tmp_path):
    scoring = load_model(adapter, "float32")
    parameters = scored_parameters(scoring.model, "last-layers:1")
    about = tensor_file.Provenance("direction", fingerprint(scoring.model), "last-layers:1", "v", 1, 1)
    path = str(tmp_path / "direction.safetensors")
    tensors = {f"direction/{name}": torch.ones_like(p) for name, p in parameters.items()}
    tensor_file.save(path, tensor_file.TensorFile(about, tensors))
    config = ScoreConfig(model=adapter, data=["d"], direction=path, fisher="f", reference_model="m", output="o")
    with pytest.raises(UserError, match="for stability merge it"):
        build_estimator(config, scoring, path)
