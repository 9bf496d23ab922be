"""Tensor files: round trip, provenance, refusals."""

import pickle

import pytest
import torch

from alphatoken import tensor_file
from alphatoken.errors import UserError

PROVENANCE = tensor_file.Provenance("direction", "abc", "all-linear", "def", 3, 40, {"normalization": "token"})


@pytest.mark.parametrize("place", ["{}/deep/direction.safetensors", "memory://tensor-files/direction.safetensors"])
def test_round_trip(tmp_path, place):
    path = place.format(tmp_path)
    tensors = {"direction/a.weight": torch.randn(3, 4), "scale/a.weight": torch.rand(3, 4).T.contiguous().T}
    tensor_file.save(path, tensor_file.TensorFile(PROVENANCE, tensors))
    found = tensor_file.load(path, "direction")
    assert found.provenance == PROVENANCE == tensor_file.read_provenance(path, "direction")
    assert torch.equal(found.group("direction")["a.weight"], tensors["direction/a.weight"])
    assert torch.equal(found.group("scale")["a.weight"], tensors["scale/a.weight"])
    assert not found.group("fisher")


def test_refusals(tmp_path):
    path = str(tmp_path / "file")
    with pytest.raises(UserError, match="no such file.*alphatoken direction"):
        tensor_file.load(path, "direction")
    with open(path, "wb") as stream:
        pickle.dump({"a": 1}, stream)
    with pytest.raises(UserError, match="not a direction file"):
        tensor_file.load(path, "direction")
    tensor_file.save(path, tensor_file.TensorFile(PROVENANCE, {"direction/a": torch.zeros(1)}))
    with pytest.raises(UserError, match="holds a direction, not a fisher"):
        tensor_file.load(path, "fisher")


def test_mismatches_name_both_sides():
    with pytest.raises(UserError, match="another checkpoint.*abc.*xyz"):
        tensor_file.check_matches(PROVENANCE, "d", "xyz", None)
    with pytest.raises(UserError, match="covers --parameters all-linear, this run scores last-layers:3"):
        tensor_file.check_matches(PROVENANCE, "d", "abc", "last-layers:3")
    tensor_file.check_matches(PROVENANCE, "d", "abc", "all-linear")
