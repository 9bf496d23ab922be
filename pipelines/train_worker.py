"""What one Ray Train worker does: load its model and rows, train, report checkpoints.

A checkpoint is a plain Trainer checkpoint at the root of Ray's checkpoint folder: weights and trainer state from
worker 0, its own random state from each worker. Every worker keeps its files in a folder of its own, so nothing is
written or uploaded twice.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import ray.train
import torch
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedModel, PrinterCallback, TrainerCallback

from alphatoken import storage
from alphatoken.embedded import resolve_model
from alphatoken.errors import UserError
from alphatoken.model import fingerprint
from alphatoken.token_classes import class_of_ids
from alphatoken.tokenizer import load_tokenizer
from alphatoken.train_config import BY_LOSS, TrainConfig
from pipelines import metrics
from pipelines.cluster import prepare_worker
from pipelines.live_values import gradient_options, load_fisher, validation_batches
from pipelines.train_data import columns_for, load_rows
from pipelines.train_export import TRAINER_STATE

# Whole weights in checkpoints: what export and a run with another number of workers can read.
FSDP_ARGUMENTS = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
}
METRICS_SECONDS = 1.0  # the metrics file is written again at most this often

logger = logging.getLogger(__name__)


def train_worker(settings: dict) -> dict:
    """The function that Ray Train runs. A UserError comes back as a value: trying again would not help."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    prepare_worker(settings["threads"])
    datasets.disable_progress_bars()
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line per checkpoint and worker
    folder = tempfile.mkdtemp(prefix="alphatoken-train-")
    try:
        return _train(settings["config"], settings, folder)
    except UserError as error:
        return {"user_error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train(config: TrainConfig, settings: dict, folder: str) -> dict:
    trainer = build_trainer(config, settings, folder)
    _agree(trainer, trainer.check_masks())
    trainer.add_callback(ReportCheckpoint())
    if trainer.is_world_process_zero():
        trainer.add_callback(MetricsFile(settings["metrics"], config.stage))
    model_fingerprint = fingerprint(trainer.model) if trainer.is_world_process_zero() else None
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as path:
        state = _finished_state(path)
        if state is None:
            trainer.train(resume_from_checkpoint=path)
            state = {"global_step": trainer.state.global_step, "log_history": trainer.state.log_history}
    return {
        "steps": state["global_step"],
        "history": [_without_nan(entry) for entry in state["log_history"]],
        "model_fingerprint": model_fingerprint,
        "seconds": getattr(trainer, "seconds", {}),
    }


def _agree(trainer: Any, problem: str | None) -> None:
    """UserError on every worker if there is a problem on one: the others would wait for it for ever."""
    from accelerate.utils import gather_object

    found = [text for text in gather_object([problem]) if text]
    if found:
        raise UserError(found[0])


def _finished_state(checkpoint: str | None) -> dict | None:
    """The state in a checkpoint that is the end of the run: a Trainer resumed there would do one step too many."""
    if checkpoint is None:
        return None
    state = json.loads(Path(checkpoint, TRAINER_STATE).read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    done = state["global_step"] >= state["max_steps"] or control.get("should_training_stop")
    return state if done else None


def build_trainer(config: TrainConfig, settings: dict, folder: str) -> Any:
    """The trainer of the objective with its model and rows. `settings`: see pipelines/train.py."""
    from pipelines.in_run import InRunDPOTrainer, InRunSFTTrainer
    from pipelines.live_trainer import LiveDPOTrainer, LiveSFTTrainer
    from pipelines.trainers import DPOCollator, MaskedDPOTrainer, MaskedSFTTrainer, SFTCollator

    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    reference = settings["stored_reference"]
    live = settings.get("live")
    masked = not (config.in_run or live)  # else the masks come while training
    columns = columns_for(config.objective, settings["columns"], config.weights, reference, masked)
    if live and config.objective == "dpo":
        columns = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in settings["columns"]]
    shared = {
        "model": load_for_training(config.model, config),
        "args": training_arguments(config, folder, reference),
        "train_dataset": load_rows(settings["shards"], columns),
        "eval_dataset": _evaluation_rows(config, settings),
        "processing_class": tokenizer,
        "peft_config": _lora(config),
        "callbacks": [EarlyStoppingCallback(config.early_stopping)] if config.early_stopping else None,
    }
    if live:
        more = {"live": live, "config": config}
    else:
        more = {"plan": in_run_plan(config, shared["args"])} if config.in_run else {}
    if config.objective == "sft":
        collator: Any = SFTCollator(pad, config.max_length, config.weights, use_masks=not config.in_run)
        kind = LiveSFTTrainer if live else InRunSFTTrainer if config.in_run else MaskedSFTTrainer
        trainer = kind(**shared, **more, data_collator=collator, normalize=config.normalize)
    else:
        collator = DPOCollator(pad, config.max_length, reference, config.dpo_mask, use_masks=not config.in_run)
        name = None if reference else config.reference_model  # LoRA without one: the model without its adapter
        if live and not name:
            name = config.model
        ref_model = load_for_training(name, config) if name else None
        kind = LiveDPOTrainer if live else InRunDPOTrainer if config.in_run else MaskedDPOTrainer
        trainer = kind(**shared, **more, data_collator=collator, ref_model=ref_model, dpo_mask=config.dpo_mask)
    trainer.remove_callback(PrinterCallback)  # the driver shows the metrics file
    return trainer


def in_run_plan(config: TrainConfig, args: Any) -> Any:
    """Validation rows (this worker's share), Fisher and reference weights of an in-run training."""
    from pipelines.in_run_refresh import InRunPlan

    fisher, weights = load_fisher(config, args.device) or (None, None)
    by_bounds = config.rule in BY_LOSS
    class_of = torch.from_numpy(class_of_ids(config.model, config.trust_remote_code)) if by_bounds else None
    return InRunPlan(
        estimator=config.estimator,
        rule=config.rule,
        keep_fraction=config.keep_fraction,
        refresh_every=config.refresh_every,
        plain_steps=config.plain_steps,
        options=gradient_options(config, args.device),
        validation=validation_batches(config, args.device, args.process_index, args.world_size),
        window=config.window,
        preconditioner=config.preconditioner,
        stability_weight=config.stability_weight,
        fisher=fisher,
        reference_weights=weights,
        class_of=class_of,
    )


def _evaluation_rows(config: TrainConfig, settings: dict) -> Any:
    if not settings["evaluation_shards"]:
        return None
    there = storage.read_schema(settings["evaluation_shards"][0]).names
    masked = config.objective == "dpo"  # of rows the mask plays no part
    columns = columns_for(config.objective, there, False, settings["stored_reference"], masked)
    return load_rows(settings["evaluation_shards"], columns)


def training_arguments(config: TrainConfig, folder: str, stored_reference: bool) -> Any:
    """TRL's arguments for a TrainConfig."""
    from trl import DPOConfig, SFTConfig

    on_gpu = config.gpus_per_worker > 0
    shared = {
        "output_dir": folder,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup,
        "optim": config.optimizer,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.per_device_batch_size,
        "per_device_eval_batch_size": config.per_device_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu),
        "use_cpu": not on_gpu,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "report_to": config.report_to or "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        # Rounds save where a window begins (pipelines/live_trainer.py).
        "save_steps": config.checkpoint_steps if config.stage == "train" else 10**9,
        "eval_strategy": "steps" if config.evaluation else "no",
        "eval_steps": config.eval_steps if config.evaluation else None,
        "prediction_loss_only": True,
        "metric_for_best_model": "eval_loss" if config.early_stopping else None,
        "greater_is_better": False if config.early_stopping else None,
        "restore_callback_states_from_checkpoint": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": on_gpu,
        "max_length": None,  # rows are cut by our collators
    }
    if config.fsdp:
        shared |= FSDP_ARGUMENTS
    if config.objective == "sft":
        return SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
    return DPOConfig(**shared, beta=config.beta, precompute_ref_log_probs=stored_reference)


def load_for_training(name: str, config: TrainConfig) -> PreTrainedModel:
    """Weights in float32 (or float64), whatever they are stored in: small updates are lost in bfloat16."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model(name), dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load model {name!r}: {str(error).strip().splitlines()[0]}") from error


def _lora(config: TrainConfig) -> Any:
    if not config.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
        task_type="CAUSAL_LM",
    )


class ReportCheckpoint(TrainerCallback):
    """Hands every checkpoint to Ray Train, each worker its own files, and waits until it is stored."""

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        metrics: dict[str, float] = {"step": state.global_step}
        for entry in state.log_history:
            if entry["step"] == state.global_step and math.isfinite(entry.get("eval_loss", math.nan)):
                metrics["eval_loss"] = entry["eval_loss"]
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))
        shutil.rmtree(folder, ignore_errors=True)


class MetricsFile(TrainerCallback):
    """All log lines so far as one JSONL file, written anew each time: after a resume no line is there twice, and
    object stores know no append. Steps and tokens go to Ray's metrics too.
    """

    def __init__(self, uri: str, stage: str) -> None:
        self.uri, self.stage = uri, stage
        self.due = 0.0
        self.steps = self.tokens = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.steps = state.global_step  # more than 0 after a resume; TRL counts tokens of this process

    def on_log(self, args, state, control, **kwargs) -> None:
        tokens = max(int(state.log_history[-1].get("num_tokens", 0)), self.tokens)
        metrics.count_steps(self.stage, state.global_step - self.steps, tokens - self.tokens)
        self.steps, self.tokens = state.global_step, tokens
        if time.monotonic() >= self.due:
            self._write(state)

    def on_save(self, args, state, control, **kwargs) -> None:
        self._write(state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        started = time.monotonic()
        lines = (json.dumps(_without_nan(entry), allow_nan=False) + "\n" for entry in state.log_history)
        storage.write_bytes("".join(lines).encode(), self.uri)
        now = time.monotonic()
        self.due = now + max(METRICS_SECONDS, 50 * (now - started))  # a long history costs 2% of the time at most


def _without_nan(entry: dict) -> dict:
    """JSON knows no NaN and no infinity: null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in entry.items()}
