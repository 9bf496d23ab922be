"""`python run_torchtune.py MODEL FOLDER OUTPUT STEPS`: torchtune's own recipe; prints the losses of its steps.

Run by test_stacks.py: nothing of AlphaToken is imported.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import datasets
import torch
import torchtune
from omegaconf import OmegaConf
from torch.utils.data import Dataset


class Rows(Dataset):
    """The exported rows, for padded_collate_sft."""

    def __init__(self, tokenizer, folder: str) -> None:
        self.rows = datasets.load_dataset("parquet", data_files=f"{folder}/data/*.parquet", split="train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {name: self.rows[index][name] for name in ("tokens", "labels")}


class Tokenizer:
    """The recipe asks for the padding token alone: rows are tokens already."""

    pad_id = 0


def model(path: str):
    """torchtune's Llama with the sizes of a checkpoint."""
    from torchtune.models.llama2 import llama2

    config = json.loads(Path(path, "config.json").read_text())
    return llama2(
        vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"], max_seq_len=64, intermediate_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
    )  # fmt: skip


def load_recipe():
    """The file that `tune run full_finetune_single_device` runs: it cannot be imported by name."""
    site = Path(torchtune.__file__).parents[1]
    spec = importlib.util.spec_from_file_location("recipe", site / "recipes" / "full_finetune_single_device.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


if __name__ == "__main__":
    recipe = load_recipe()
    path, folder, output, steps = sys.argv[1:]
    config = OmegaConf.create(
        {
            "output_dir": output, "device": "cpu", "dtype": "fp32", "seed": 0, "compile": False,
            "tokenizer": {"_component_": "run_torchtune.Tokenizer"},
            "dataset": {"_component_": "run_torchtune.Rows", "folder": folder},
            "model": {"_component_": "run_torchtune.model", "path": path},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": path,
                "checkpoint_files": ["model.safetensors"], "output_dir": output, "model_type": "LLAMA2",
            },
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}, "optimizer_in_bwd": False,
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": output,
                              "filename": "log.txt"},
            "shuffle": False, "batch_size": 10, "epochs": int(steps), "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1, "clip_grad_norm": None, "resume_from_checkpoint": False,
            "log_every_n_steps": 1, "log_peak_memory_stats": False, "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    run = recipe.FullFinetuneRecipeSingleDevice(cfg=config)
    run.setup(cfg=config)
    run.save_checkpoint = lambda *_, **__: None
    run.train()
    run.cleanup()
    print(json.dumps([float(loss) for loss in re.findall(r"loss:([\d.e+-]+)", Path(output, "log.txt").read_text())]))
