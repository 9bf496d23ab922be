"""`python run_axolotl.py MODEL FOLDER OUTPUT STEPS`: Axolotl's own training; prints the losses of its steps.

Run by test_stacks.py: nothing of AlphaToken is imported.
"""

import json
import sys
from pathlib import Path

import yaml
from snippet import read_snippet
from stubs import stand_for

if __name__ == "__main__":
    stand_for("triton", "bitsandbytes")
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    model, folder, output, steps = sys.argv[1:]
    config = read_snippet(folder) | {
        "base_model": model,
        "dataset_prepared_path": f"{output}/prepared",
        "output_dir": output, "sequence_len": 64, "sample_packing": False, "pad_to_sequence_len": False,
        "micro_batch_size": 10, "gradient_accumulation_steps": 1, "max_steps": int(steps), "optimizer": "sgd",
        "learning_rate": 0.1, "lr_scheduler": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "bf16": False, "fp16": False, "tf32": False, "use_cpu": True,
    }  # fmt: skip
    Path(output).mkdir(parents=True, exist_ok=True)
    Path(output, "config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg(f"{output}/config.yaml")
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
