"""Exports against the rows that they come from, and training on them with the stacks that are installed here."""

import json
import re

import datasets
import pyarrow as pa
import pytest
import torch

from alphatoken import storage
from alphatoken.config import ExportConfig
from alphatoken.errors import UserError
from alphatoken.export_formats import DPO, REFUSED, SFT, format_of
from alphatoken.schema import BRANCHES
from jobs import export as job
from pipelines.export import run_export
from tests.masked_folder import pair_rows, sft_rows, write_masked
from tests.test_trainers import TOKENIZER, options, small_model


@pytest.fixture
def masked(tmp_path):
    """(folder, rows) of SFT."""
    return with_counts(write_masked(tmp_path / "masked", sft_rows(10), "m")), sft_rows(10)


def with_counts(folder: str, pairs: bool = False) -> str:
    manifest = storage.read_json(f"{folder}/manifest.json") | {"counts": {"rows_out": 10}, "pairs": pairs}
    storage.write_json(manifest, f"{folder}/manifest.json")
    return folder


def exported(folder: str, to: str, tmp_path) -> list[dict]:
    output = str(tmp_path / to)
    manifest = run_export(ExportConfig(input=folder, to=to, output=output))
    assert manifest["counts"] == {"rows_in": 10, "rows_out": 10}
    assert output in manifest["snippet"] and manifest["snippet"].strip() in (tmp_path / to / "README.md").read_text()
    return pa.concat_tables([storage.read_table(uri) for uri in storage.list_shards(output)]).to_pylist()


def test_columns_of_every_stack(masked, tmp_path):
    folder, rows = masked
    for stack in SFT:
        for found, row in zip(exported(folder, stack, tmp_path), rows, strict=True):
            ids, labels = row["input_ids"], row["labels"]
            if stack == "torchtune":
                assert found == {"tokens": ids, "labels": labels, "shifted_labels": labels[1:] + [-100]}
            elif stack == "verl":
                assert found == {"input_ids": ids, "loss_mask": [int(label != -100) for label in labels]}
            elif stack in ("trl", "unsloth"):
                assert found == {"input_ids": ids, "labels": labels}
            else:
                assert found == {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def test_columns_of_pairs(tmp_path):
    rows = pair_rows(10)
    folder = with_counts(write_masked(tmp_path / "masked", rows, "m"), pairs=True)
    for stack in DPO:
        for found, row in zip(exported(folder, stack, tmp_path), rows, strict=True):
            if stack == "trl":
                assert {name: found[name] for name in row} == row
                continue
            for branch in BRANCHES:
                ids, mask, prompt = row[f"{branch}_ids"], row[f"{branch}_mask"], row["prompt_ids"]
                assert found[f"{branch}_input_ids"] == prompt + ids
                assert found[f"{branch}_attention_mask"] == [1] * len(prompt + ids)
                kept = [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
                assert found[f"{branch}_labels"] == [-100] * len(prompt) + kept
            media = {"images", "videos", "audios"} if stack == "llama-factory" else set()
            ours = {f"{b}_{name}" for b in BRANCHES for name in ("input_ids", "attention_mask", "labels")}
            assert found.keys() - ours == media


def masked_loss(model, rows: list[dict]) -> float:
    """Mean loss of the kept tokens of all rows, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for i, label in enumerate(row["labels"]):
            if i and label != -100:
                total -= float(torch.log_softmax(logits[i - 1], -1)[label])
                count += 1
    return total / count


@pytest.mark.parametrize("stack", ["trl", "hf-trainer", "llama-factory"])
def test_first_losses_of_real_trainers_are_the_masked_losses(stack, masked, tmp_path):
    """All rows in one batch, so the first logged loss is the masked loss at the start; the second is after a step."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    folder, rows = masked
    exported(folder, stack, tmp_path)
    output = tmp_path / stack
    if stack == "llama-factory":  # what it reads, and the collator that its own one extends
        data = datasets.load_from_disk(str(output / "dataset"))["train"]
    else:
        files = str(output / "data" / "*.parquet")
        data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    model = small_model(dtype=torch.float32)
    before = masked_loss(model, rows)
    changes = {"max_steps": 2, "per_device_train_batch_size": 10, "learning_rate": 0.1}
    if stack == "trl":
        arguments = SFTConfig(**options(tmp_path / "out", **changes))
        trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=TOKENIZER)
    else:
        plain = {name: value for name, value in options(tmp_path / "out", **changes).items() if name != "max_length"}
        collator = DataCollatorForSeq2Seq(TOKENIZER)
        trainer = Trainer(model, TrainingArguments(**plain), train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(before, rel=1e-3)
    assert losses[1] != pytest.approx(before, rel=1e-3)


def test_the_verl_class_pads_and_aligns(masked, tmp_path):
    folder, rows = masked
    exported(folder, "verl", tmp_path)
    source = storage.read_json(f"{tmp_path}/verl/manifest.json")["snippet"]
    space: dict = {}
    exec(source, space)
    [files] = re.findall(r"data\.train_files=(\S+)", source)

    class WithPad:
        pad_token_id = 3

    shards = storage.list_shards(str(tmp_path / "verl"))
    assert len(shards) == 2 and len(space["TokenMasked"](shards, WithPad, {})) == 10
    data = space["TokenMasked"](files, WithPad, {"max_length": 16})
    assert len(data) == 10
    for found, row in zip((data[i] for i in range(10)), rows, strict=True):
        ids, labels = row["input_ids"][:16], row["labels"][:16]
        padding = 16 - len(ids)
        assert found["input_ids"].tolist() == ids + [3] * padding
        assert found["loss_mask"].tolist() == [int(label != -100) for label in labels] + [0] * padding
        assert found["attention_mask"].tolist() == [1] * len(ids) + [0] * padding
        assert found["position_ids"].tolist() == [*range(len(ids))] + [0] * padding
    loose = space["TokenMasked"](shards[0], WithPad, {"pad_mode": "no_padding"})[0]
    assert loose.keys() == {"input_ids", "loss_mask", "position_ids"}


def test_stacks_that_cannot_are_refused():
    for stack in REFUSED:
        with pytest.raises(UserError, match="token masks cannot reach its loss"):
            format_of(stack, pairs=False)
    with pytest.raises(UserError, match="no token masks in DPO"):
        format_of("axolotl", pairs=True)
    with pytest.raises(UserError, match="no such stack; there are axolotl"):
        format_of("megatron", pairs=False)


def test_a_cut_off_export_goes_on_and_a_changed_one_is_refused(masked, tmp_path, monkeypatch):
    folder, _ = masked
    config = ExportConfig(input=folder, to="axolotl", output=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.export.RunFolder.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_export(config)
    assert run_export(config)["counts"]["rows_out"] == 10
    assert run_export(config)["counts"]["rows_out"] == 10  # finished: nothing is done
    with pytest.raises(UserError, match="to: axolotl -> verl"):
        run_export(config.model_copy(update={"to": "verl"}))


def test_job(masked, tmp_path, capsys):
    folder, _ = masked
    assert job.main([folder, "--to", "axolotl", "--output", str(tmp_path / "out")]) == 0
    assert "ds_type: parquet" in capsys.readouterr().out
    assert job.main([folder, "--to", "openrlhf", "--output", str(tmp_path / "no")]) == 2
    assert "OpenRLHF tokenises text itself" in capsys.readouterr().err
    assert job.main([folder, "--to", "trl", "--output", str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "trl"
