"""Named tensors with provenance in one safetensors file: what directions and Fisher diagonals are kept in.

Only safetensors is read: a pickle is refused before anything in it runs.
"""

import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alphatoken.errors import UserError, first_line
from alphatoken.retries import retried
from alphatoken.run_folder import differences, different_run
from alphatoken.storage import exists, filesystem, is_local, temporary_name

PROVENANCE_KEY = "alphatoken"
OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")  # in what safetensors says


@dataclass(frozen=True)
class Provenance:
    """What a file of tensors was made from."""

    kind: str  # direction or fisher
    model_fingerprint: str
    parameters: str  # as --parameters: last-layers:K, all-linear ...
    data_fingerprint: str
    num_rows: int
    num_tokens: int
    options: dict = field(default_factory=dict)
    health: dict = field(default_factory=dict)  # of a direction: see direction_health.py
    central_step: float | None = None  # of a float32 direction: see Exact; so that all actors take the same
    loss_profile: dict = field(default_factory=dict)  # of a direction: see suspects.LossProfile

    @property
    def targets(self) -> dict[str, dict]:
        """What is known of each named target by its name; empty where there is one without a name."""
        return self.options.get("targets", {})


@dataclass(frozen=True)
class TensorFile:
    """Tensors by "<group>/<parameter name>", in the shape in which the model stores the parameter."""

    provenance: Provenance
    tensors: dict[str, torch.Tensor]

    def groups(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of the file's kind by name of the target; one target without a name is ''."""
        kind = self.provenance.kind
        return {target: self.group(group_of(kind, target)) for target in self.provenance.targets or ("",)}

    def group(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one group by parameter name; empty where the file has none."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def group_of(kind: str, target: str) -> str:
    """The group that holds the tensors of a target."""
    return f"{kind}.{target}" if target else kind


def save(path: str, contents: TensorFile) -> None:
    """Write to a local path or URI; a reader never sees half a file.

    Raises:
        UserError: it cannot be written there.
    """
    fs, target = filesystem(path)
    try:
        if is_local(path):  # not by way of the system's temporary folder, which may be small, or memory
            retried(lambda: _write_beside(target, contents), path)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "tensors")
            retried(lambda: _write(local, contents), local)
            retried(lambda: _put(fs, local, target), path)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{path} cannot be written ({reason}); mend that or give another --output") from error


def _write(file: str, contents: TensorFile) -> None:
    """Raises OSError as Python's own writing does."""
    metadata = {PROVENANCE_KEY: json.dumps(asdict(contents.provenance), sort_keys=True)}
    try:
        save_file({key: value.contiguous() for key, value in contents.tensors.items()}, file, metadata=metadata)
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), file) from error


def _write_beside(target: str, contents: TensorFile) -> None:
    """Under a temporary name in the same folder, then renamed."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = temporary_name(target)
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        _write(temporary, contents)
        os.chmod(temporary, mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb") as file:  # else a power cut may leave the new name with no content
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def _put(fs: fsspec.AbstractFileSystem, local: str, target: str) -> None:
    parent = target.rpartition("/")[0]
    if parent:
        fs.makedirs(parent, exist_ok=True)
    fs.put_file(local, target + ".tmp")
    fs.mv(target + ".tmp", target)


def load(path: str, kind: str) -> TensorFile:
    """Read a file that `save` wrote. A local one is mapped: processes of a machine share its memory.

    Raises:
        UserError: it is missing, is not safetensors, was not written by us or is of another kind.
    """
    fs, source = _existing(path, kind)
    if is_local(path):
        return TensorFile(_read_provenance(source, path, kind), load_file(source))
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "tensors")
        retried(lambda: fs.get_file(source, local), path)
        return TensorFile(_read_provenance(local, path, kind), load_file(local))


def read_provenance(path: str, kind: str) -> Provenance:
    """The provenance alone, without the tensors' bytes in memory. Raises as `load` does."""
    fs, source = _existing(path, kind)

    def header() -> bytes:
        with fs.open(source, "rb") as stream:
            return _header(stream)

    return _parse_header(retried(header, path), path, kind)


def _existing(path: str, kind: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Where the file is. UserError where there is none."""
    if not exists(path):
        raise UserError(f"{path}: no such file; make it with `alphatoken {kind}`")
    return filesystem(path)


def _read_provenance(local: str, path: str, kind: str) -> Provenance:
    with open(local, "rb") as stream:
        return _parse_header(_header(stream), path, kind)


def _header(stream: BinaryIO) -> bytes:
    """Of a safetensors file: its length, then JSON."""
    size = int.from_bytes(stream.read(8), "little")
    return stream.read(size) if 0 < size <= 2**27 else b""


def _parse_header(raw: bytes, path: str, kind: str) -> Provenance:
    try:
        provenance = Provenance(**json.loads(json.loads(raw)["__metadata__"][PROVENANCE_KEY]))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a {kind} file that AlphaToken wrote; make it with `alphatoken {kind}`"
        ) from error
    if provenance.kind != kind:
        raise UserError(f"{path} holds a {provenance.kind}, not a {kind}")
    return provenance


def finished(path: str, kind: str, run: dict, overwrite: bool) -> Provenance | None:
    """The provenance of the file at `path` if `run` made it; None where there is no file, or another's is replaced.

    run: fields of Provenance that say which run it is, of `options` some. Raises UserError where something else is
    there.
    """
    if not exists(path):
        return None
    found = read_provenance(path, kind)
    there = {name: getattr(found, name) for name in run}
    there["options"] = {name: found.options.get(name) for name in run["options"]}
    changed = list(differences(there, run))
    if changed and not overwrite:
        raise UserError(different_run(path, changed))
    return None if changed else found


def check_matches(provenance: Provenance, path: str, model_fingerprint: str, parameters: str | None) -> None:
    """The file must be about this checkpoint and these parameters.

    Raises:
        UserError: it is not.
    """
    if provenance.model_fingerprint != model_fingerprint:
        raise UserError(
            f"{path} was made with another checkpoint (fingerprint {provenance.model_fingerprint[:8]}, the model "
            f"has {model_fingerprint[:8]}); make it again with `alphatoken {provenance.kind}`"
        )
    if parameters is not None and provenance.parameters != parameters:
        raise UserError(
            f"{path} covers --parameters {provenance.parameters}, this run scores {parameters}; make it again with "
            f"`alphatoken {provenance.kind} --parameters {parameters}`"
        )
