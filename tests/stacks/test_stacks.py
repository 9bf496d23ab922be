"""Exports, trained on for a few steps by other stacks' own code: every step's loss is ours.

Each stack runs in a process of its own (beside.py). All rows are in every batch, so their order does not matter.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken import storage
from alphatoken.config import ExportConfig
from alphatoken.schema import BRANCHES
from pipelines.export import run_export
from tests.masked_folder import pair_rows, sft_rows, write_masked, write_model
from tests.stacks.beside import run_beside

STEPS, RATE, BETA = 3, 0.1, 0.1
NAMES = {"axolotl": "axolotl", "llama-factory": "llama_factory", "torchtune": "torchtune", "verl": "verl"}


def losses_of(stack: str, model: str, folder: str, output: Path) -> list[float]:
    """Of the steps that the stack does on an exported folder."""
    name = NAMES[stack]
    return run_beside(name, f"run_{name}.py", [model, folder, str(output), str(STEPS)], output.parent)


def exported(stack: str, rows: list[dict], model: str, folder: Path) -> str:
    masked = write_masked(folder / "masked", rows, model)
    about = storage.read_json(f"{masked}/manifest.json")
    counted = {"counts": {"rows_out": len(rows)}, "pairs": "chosen_ids" in rows[0]}
    storage.write_json(about | counted, f"{masked}/manifest.json")
    output = str(folder / "exported")
    run_export(ExportConfig(input=masked, to=stack, output=output))
    return output


def trained(path: str, loss_of) -> list[float]:
    """Losses before each step of plain gradient descent."""
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logprobs(model, ids: list[int]) -> torch.Tensor:
    """Of ids[1:]."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("stack", sorted(NAMES))
def test_sft_is_trained_with_the_masked_loss(stack, tmp_path):
    rows = sft_rows(10)
    model = write_model(tmp_path / "model", tie_word_embeddings=False)
    folder = exported(stack, rows, model, tmp_path)

    def masked_loss(model) -> torch.Tensor:
        kept = [torch.tensor(row["labels"][1:]) != -100 for row in rows]
        found = [logprobs(model, row["input_ids"])[keep] for row, keep in zip(rows, kept, strict=True)]
        return -torch.cat(found).mean()

    expected = trained(model, masked_loss)
    assert losses_of(stack, model, folder, tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    assert expected[0] - expected[-1] > 0.1


@pytest.mark.slow
def test_llama_factory_masks_both_branches_of_pairs(tmp_path):
    """Gradient and log-ratio, as its note says."""
    rows = pair_rows(10)
    path = write_model(tmp_path / "model", tie_word_embeddings=False)
    folder = exported("llama-factory", rows, path, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)

    def masked(model, row: dict, branch: str) -> torch.Tensor:
        found = logprobs(model, row["prompt_ids"] + row[f"{branch}_ids"])
        return found[len(row["prompt_ids"]) - 1 :][torch.tensor(row[f"{branch}_mask"])].sum()

    def dpo_loss(model) -> torch.Tensor:
        ratios = [[masked(model, row, b) - masked(reference, row, b) for b in BRANCHES] for row in rows]
        return -torch.stack([torch.nn.functional.logsigmoid(BETA * (c - r)) for c, r in ratios]).mean()

    expected = trained(path, dpo_loss)
    assert losses_of("llama-factory", path, folder, tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    assert expected[0] == pytest.approx(0.6931, abs=1e-3) and expected[0] - expected[-1] > 0.01
