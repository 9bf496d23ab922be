"""`python run_llama_factory.py MODEL FOLDER OUTPUT STEPS`: LLaMA-Factory's SFT or DPO; prints the losses of its steps.

Run by test_stacks.py: nothing of AlphaToken is imported.
"""

import json
import sys
from pathlib import Path

from snippet import read_snippet
from stubs import stand_for

if __name__ == "__main__":
    stand_for("torchaudio")
    from llamafactory.train.tuner import run_exp

    model, folder, output, steps = sys.argv[1:]
    run_exp(
        read_snippet(folder)
        | {
            "do_train": True, "finetuning_type": "full", "model_name_or_path": model, "template": "empty",
            "output_dir": output, "pref_beta": 0.1,
            "per_device_train_batch_size": 10, "max_steps": int(steps), "learning_rate": 0.1, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
            "use_cpu": True, "report_to": "none", "gradient_checkpointing": False,
        }
    )  # fmt: skip
    history = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    print(json.dumps([entry["loss"] for entry in history if "loss" in entry]))
