"""Tensor files: round trip, provenance, refusals."""

import os
import pickle
import resource
import tempfile

import pytest
import torch
from safetensors import SafetensorError

from alphatoken import storage, tensor_file
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


def test_what_others_see_while_a_file_is_written(tmp_path, monkeypatch):
    """The old file, and temporary names that readers pass over, in the folder of the target."""
    path, seen = tmp_path / "direction.safetensors", []
    monkeypatch.setattr(tempfile, "TemporaryDirectory", None)
    contents = tensor_file.TensorFile(PROVENANCE, {"direction/a": torch.zeros(3)})
    tensor_file.save(str(path), contents)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it too
    replace = os.replace

    def renamed(source, target):
        seen.append((os.path.dirname(source), os.path.basename(source), target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    tensor_file.save(str(path), contents)
    [(folder, name, target)] = seen
    assert (folder, target) == (str(tmp_path), str(path)) and storage.TEMPORARY_PATTERN.match(name)
    assert sorted(os.listdir(tmp_path)) == ["direction.safetensors", "plain"]


@pytest.mark.parametrize("place", ["{}/direction.safetensors", "memory://tensor-files/too-large.safetensors"])
def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path, place):
    path = place.format(tmp_path)
    contents = tensor_file.TensorFile(PROVENANCE, {"direction/a": torch.zeros(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            tensor_file.save(path, contents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == f"{path} cannot be written (File too large); mend that or give another --output"
    assert not os.listdir(tmp_path) and not storage.exists(path)


def test_full_disks_and_closed_folders(tmp_path, monkeypatch):
    contents = tensor_file.TensorFile(PROVENANCE, {"direction/a": torch.zeros(3)})

    def full(tensors, file, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/d cannot be written .File exists|Not a directory"):
        tensor_file.save(str(tmp_path / "file" / "d"), contents)
    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(UserError, match=f"^{tmp_path}/d: no space is left there .*run the same command again"):
        tensor_file.save(str(tmp_path / "d"), contents)
    assert os.listdir(tmp_path) == ["file"]


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
