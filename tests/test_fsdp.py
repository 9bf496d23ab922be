"""FSDP2 over two processes on the CPU: the same losses and weights as one process with whole weights, and a resume.

accelerate turns FSDP on only where it counts several accelerators, so the processes say they are such; what shards,
gathers and reduces is torch's FSDP2 over gloo. `--fsdp` itself asks for GPUs, where FSDP pays.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("trl")
from tests.masked_folder import pair_rows, sft_rows
from tests.test_trainers import BETA, PAD, TOKENIZER, options, small_model

STEPS, BATCH = 4, 4
PORT = 29_400


def build(objective: str, folder: str, workers: int):
    import datasets
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, SFTConfig

    from pipelines.train_worker import FSDP_ARGUMENTS
    from pipelines.trainers import DPOCollator, MaskedDPOTrainer, MaskedSFTTrainer, SFTCollator

    changes = {
        "max_steps": STEPS, "learning_rate": 0.01, "optim": "adamw_torch", "max_grad_norm": 1.0,
        "per_device_train_batch_size": BATCH // workers, "save_strategy": "steps", "save_steps": 2,
        **(FSDP_ARGUMENTS if workers > 1 else {}),
    }  # fmt: skip
    sft = objective == "sft"
    special = {"dataset_kwargs": {"skip_prepare_dataset": True}} if sft else {"beta": BETA}
    if not sft:
        special["precompute_ref_log_probs"] = True
    arguments = (SFTConfig if sft else DPOConfig)(**options(folder, **changes, **special))
    if workers > 1:
        assert arguments.device.type == "cpu"  # initialises PartialState
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = sft_rows(12) if sft else pair_rows(12)
    for row in () if sft else rows:
        row |= {"ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0}
    more = {} if sft else {"dpo_mask": "loss"}
    return (MaskedSFTTrainer if sft else MaskedDPOTrainer)(
        AutoModelForCausalLM.from_pretrained(f"{folder}/start"),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
        data_collator=SFTCollator(PAD) if sft else DPOCollator(PAD, None, True, "loss"),
        **more,
    )


def work(rank: int, objective: str, folder: str, workers: int, port: int, resume: bool) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    trainer = build(objective, folder, workers)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    if workers > 1:
        from torch.distributed.tensor import DTensor

        assert trainer.is_fsdp_enabled
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    trainer.save_model(f"{folder}/final")
    if rank == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(losses, f"{folder}/losses.pt")


def run(objective: str, folder: Path, workers: int, port: int, resume: bool = False) -> tuple[list[float], dict]:
    from transformers import AutoModelForCausalLM

    small_model(dtype=torch.float32).save_pretrained(folder / "start")  # as in a real run: TRL looks its name up
    torch.multiprocessing.spawn(work, (objective, str(folder), workers, port, resume), nprocs=workers)
    weights = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return torch.load(folder / "losses.pt", weights_only=True), weights


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", pytest.param("dpo", marks=pytest.mark.full)])
def test_two_sharded_processes_train_as_one_whole_one(objective, tmp_path):
    port = PORT + os.getpid() % 1000
    losses, whole = run(objective, tmp_path / "whole", 1, port)
    sharded_losses, sharded = run(objective, tmp_path / "sharded", 2, port + 1000)
    assert len(losses) == STEPS and losses[0] != losses[-1]
    assert sharded_losses == pytest.approx(losses, rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-4)  # AdamW: signs of tiny gradients

    shutil.copytree(tmp_path / "sharded" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed_losses, resumed = run(objective, tmp_path / "resumed", 2, port + 2000, resume=True)
    assert resumed_losses == pytest.approx(sharded_losses, rel=1e-6)  # the log begins with the checkpoint's
    for name, tensor in sharded.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
