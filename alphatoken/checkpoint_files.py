"""Telling checkpoints apart by their files, where loading the weights to know them would cost too much."""

import hashlib
from pathlib import Path

from alphatoken.adapters import base_of, is_adapter
from alphatoken.embedded import resolve_model
from alphatoken.tokenizer import load_config

# Weights, configuration, tokenizer and chat template; not a README or an optimizer's state
SETTINGS = frozenset({".json", ".jinja", ".model"})
SUFFIXES = SETTINGS | {".safetensors", ".bin"}
INDEX = ".index.json"  # of weights in several files
BLOCK = 2**12  # bytes
BLOCKS = 2**10  # read of a larger file, evenly spaced: training moves nearly every weight


def files_fingerprint(name: str, trust_remote_code: bool = False) -> str:
    """Identifies what a name stands for now: a folder by its files, an adapter's with its base model, a hub name by its
    commit.

    Files count by name, size and content, of more than 4 MB by 1,024 blocks. Other than `model.fingerprint`, which
    sees the weights themselves, it takes a checkpoint for another where the same weights are saved otherwise.

    Raises:
        UserError: there is no such model.
    """
    return _fingerprint(name, trust_remote_code, SUFFIXES)


def settings_fingerprint(name: str, trust_remote_code: bool = False) -> str:
    """The same of everything but the weights: what a `model.fingerprint` does not see and values depend on."""
    return _fingerprint(name, trust_remote_code, SETTINGS)


def _fingerprint(name: str, trust_remote_code: bool, suffixes: frozenset[str]) -> str:
    folder = Path(resolve_model(name))
    if is_adapter(name):
        base = _fingerprint(base_of(name), trust_remote_code, suffixes)
        return hashlib.sha256(f"{base}{_of_folder(folder, suffixes)}".encode()).hexdigest()[:32]
    if not folder.is_dir():
        config = load_config(name, trust_remote_code)
        return str(getattr(config, "_commit_hash", None) or name)
    return _of_folder(folder, suffixes)


def _of_folder(folder: Path, suffixes: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if suffixes == SETTINGS and path.name.endswith(INDEX):
            continue
        if path.suffix in suffixes and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as stream:
                for start in _starts(size):
                    stream.seek(start)
                    digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:32]


def _starts(size: int) -> range:
    """Where blocks begin: one after the other, or further apart where that would be too many."""
    return range(0, size, max(BLOCK, size // BLOCKS))
