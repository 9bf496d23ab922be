"""The result of a training run as transformers folders: OUT/model, and OUT/adapter where LoRA was trained.

A Ray task, because checkpoints may lie where only the cluster reads fast. It imports no model code unless it has to
merge an adapter.
"""

import shutil
import tempfile
from pathlib import Path

import ray

from alphatoken import storage
from alphatoken.train_config import TrainConfig

TRAINER_STATE = "trainer_state.json"
# What a Trainer checkpoint has beside the model.
NOT_MODEL = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", TRAINER_STATE, "training_args.bin", "pytorch_model_fsdp*",
    "README.md", ".*",
)  # fmt: skip
ADAPTER = "adapter_config.json"


@ray.remote
def export_model(checkpoint, config: TrainConfig, output: str) -> None:
    """A Ray Train checkpoint's weights to OUTPUT/model; an adapter to OUTPUT/adapter, and merged to OUTPUT/model."""
    with checkpoint.as_directory() as path, tempfile.TemporaryDirectory(prefix="alphatoken-export-") as scratch:
        trained = Path(scratch, "trained")
        shutil.copytree(path, trained, ignore=shutil.ignore_patterns(*NOT_MODEL))
        if Path(trained, ADAPTER).exists():
            _upload(trained, storage.join(output, "adapter"))
            trained = _merged(trained, config, Path(scratch, "merged"))
        _upload(trained, storage.join(output, "model"))


def _merged(adapter: Path, config: TrainConfig, folder: Path) -> Path:
    from peft import PeftModel

    from pipelines.train_worker import load_for_training

    model = PeftModel.from_pretrained(load_for_training(config.model, config), str(adapter))
    model.merge_and_unload().save_pretrained(folder)
    for file in adapter.iterdir():  # the tokenizer; the adapter's own files stay behind
        if not file.name.startswith("adapter_"):
            shutil.copy(file, folder)
    return folder


def _upload(folder: Path, uri: str) -> None:
    """All files below a local folder. What was there before is replaced."""
    storage.remove_tree(uri)
    fs, target = storage.filesystem(uri)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            goal = f"{target}/{file.relative_to(folder).as_posix()}"
            fs.makedirs(goal.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(file), goal)
