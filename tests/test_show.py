"""`alphatoken show`: rows of every kind of folder, in colour and as plain text."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from alphatoken import schema, storage
from alphatoken.errors import UserError
from alphatoken.export_formats import causal_columns
from alphatoken.masking import MaskPlan, mask_table
from alphatoken.pair_masking import mask_pair_table
from alphatoken.row_view import parts, read_rows
from jobs import show
from jobs.show import coloured, marked
from tests.report_folders import HOSTILE, token_classes, write_folder
from tests.test_pair_masking import scored_pairs


def rewrite(folder: str, change) -> list[dict]:
    """Replaces the rows of every shard; returns all of them."""
    rows = []
    for shard in storage.list_shards(folder):
        table = change(storage.read_table(shard))
        storage.write_table(table, shard)
        rows += table.to_pylist()
    return rows


def folder_of(place, table: pa.Table, run: dict | None = None) -> str:
    """A folder with one shard and without the texts of tokens."""
    storage.write_table(table, storage.join(str(place), "data", "train-000000000000000.parquet"))
    storage.write_json(run or {"stage": "x", "config": {}}, storage.join(str(place), "run.json"))
    return str(place)


def shown(argv: list[str], capsys) -> str:
    """What the command prints where stdout is no terminal."""
    assert show.main(argv) == 0
    return capsys.readouterr().out


def text_of(token_ids: list[int], kept=None) -> str:
    """As `marked` writes it."""
    texts = token_classes()["text"].to_pylist()
    out, inside = "", False
    for token, keep in zip(token_ids, kept or [True] * len(token_ids), strict=True):
        out += ("-]" if keep and inside else "") + ("[-" if not keep and not inside else "") + texts[token]
        inside = not keep
    return out + ("-]" if inside else "")


@pytest.mark.parametrize("masked", [False, True])
def test_pairs_are_shown_one_response_after_the_other(tmp_path, capsys, masked):
    write_folder(str(tmp_path), pairs=True)
    change = (lambda table: mask_pair_table(table, MaskPlan(0.5, 1.0), {}, "shard").data) if masked else (lambda t: t)
    row = rewrite(str(tmp_path), change)[3]
    out = shown([str(tmp_path), "--row", "p3"], capsys)
    places = []
    for branch in ("prompt", *schema.BRANCHES):
        kept = row.get(f"{branch}_mask") if masked else None
        text = text_of(row[f"{branch}_ids"], kept)
        count = f", kept {sum(kept)} of {len(kept)} tokens" if kept and not all(kept) else ""
        assert f"{branch}{count}:\n{text}\n" in out
        places.append(out.index(f"{branch}{count}:\n{text}"))
    assert places == sorted(places) and ("[-" in out) == masked


@pytest.mark.parametrize("masked", [False, True])
def test_kept_columns_of_pairs_are_no_texts_to_show(tmp_path, capsys, masked):
    write_folder(str(tmp_path), pairs=True)

    def change(table: pa.Table) -> pa.Table:
        for name in schema.PAIRS.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.array(["kept"] * table.num_rows))
        return mask_pair_table(table, MaskPlan(1.0, 1.0), {}, "shard").data if masked else table

    row = rewrite(str(tmp_path), change)[3]
    assert row["chosen_score"] == row["chosen"] == "kept"
    out = shown([str(tmp_path), "--row", "p3"], capsys)
    for branch in ("prompt", *schema.BRANCHES):
        assert f"{branch}:\n{text_of(row[f'{branch}_ids'])}\n" in out


def test_rows_of_sft(tmp_path, capsys):
    write_folder(str(tmp_path))
    rows = rewrite(str(tmp_path), lambda table: mask_table(table, MaskPlan(0.4, 1.0), "shard").data)
    out = shown([str(tmp_path), "--row", "d.jsonl:5", "d.jsonl:2"], capsys)
    for row in (rows[2], rows[5]):
        kept = [label >= 0 or not inside for label, inside in zip(row["labels"], row["response_mask"], strict=True)]
        assert text_of(row["input_ids"], kept).replace(HOSTILE, "") in out.replace(HOSTILE, "")
        assert f"{row['id']}, kept {sum(label >= 0 for label in row['labels'])} of {row['num_response_tokens']}" in out
    assert "d.jsonl:1" not in out
    assert shown([str(tmp_path), "--limit", "3"], capsys).count(" response tokens") == 3


def test_colours_and_strikes(tmp_path):
    write_folder(str(tmp_path), pairs=True)
    rewrite(str(tmp_path), lambda table: mask_pair_table(table, MaskPlan(0.5, 1.0), {}, "shard").data)
    [row] = read_rows(str(tmp_path), ["p4"], 1)
    prompt, chosen, rejected = parts(row)
    assert {str(span.style) for span in coloured(prompt).spans} == {"dim"}
    for part in (chosen, rejected):
        text = coloured(part)
        assert len(text.spans) == len(part.tokens) and part.response == part.tokens
        for span, token in zip(text.spans, part.tokens, strict=True):
            assert ("strike" in str(span.style)) != token.kept
            green, red = (int(c) for c in str(span.style).removeprefix("rgb(").split(")")[0].split(",")[1::-1])
            assert (green >= red) == (token.value >= 0)  # faint ones are grey
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(coloured(chosen))
    assert "\x1b[9;38;2;" in console.file.getvalue()  # struck out, and coloured


def test_responses_and_pairs_without_token_texts(tmp_path, capsys):
    shared = {"row_id": 0, "id": "q1", "prompt": "2 + 2?"}
    responses = [shared | {"row_id": n, "sample": n, "text": f"answer {n}", "token_ids": [1]} for n in range(3)]
    folder = folder_of(tmp_path / "responses", pa.Table.from_pylist(responses, schema=schema.RESPONSES))
    out = shown([folder, "--row", "q1"], capsys)  # samples share the id of their prompt
    assert [f"q1, sample {n}" in out and f"response:\nanswer {n}\n" in out for n in range(3)] == [True] * 3
    pair = shared | {"chosen": "four", "rejected": "five", "chosen_score": 1.0, "prompt_ids": [1], "chosen_ids": [2]}
    folder = folder_of(tmp_path / "pairs", pa.Table.from_pylist([pair], schema=schema.PAIRS))
    assert "prompt:\n2 + 2?\nchosen:\nfour\nrejected:\nfive\n" in shown([folder], capsys)


def test_encoded_rows_and_windows_read_by_the_models_tokenizer(tmp_path, capsys, tiny_checkpoint):
    from alphatoken.tokenizer import load_tokenizer

    ids = load_tokenizer(tiny_checkpoint)("What is two?")["input_ids"]
    run = {"stage": "rounds", "config": {"model": tiny_checkpoint}}
    storage.write_json(run, str(tmp_path / "run.json"))
    row = {"row_id": 0, "id": "a", "input_ids": ids, "response_mask": [False] + [True] * (len(ids) - 1)}
    encoded = folder_of(tmp_path / "encoded", pa.Table.from_pylist([row], schema=schema.ENCODED), run)
    assert "What is two?" in shown([encoded], capsys)
    pair = {"row_id": 0, "id": "b", "prompt_ids": ids[:1], "chosen_ids": ids[1:], "rejected_ids": ids[:2]}
    window = tmp_path / "windows" / "000000012"
    table = pa.Table.from_pylist([pair | {f"{b}_mask": [False] * len(pair[f"{b}_ids"]) for b in schema.BRANCHES}])
    storage.write_table(table, str(window / "train-00000.parquet"))
    out = shown([str(window)], capsys)
    assert f"chosen, kept 0 of {len(ids) - 1} tokens:\n[-" in out
    with pytest.raises(UserError, match=r"training run, .* look at .*/encoded, .*/windows/000000012"):
        read_rows(str(tmp_path), [], 1)


def test_an_id_that_is_not_there(tmp_path):
    write_folder(str(tmp_path), pairs=True)
    with pytest.raises(UserError, match=r"no row with id nobody; its first ids are .*, p1, p2$"):
        read_rows(str(tmp_path), ["p1", "nobody"], 1)
    with pytest.raises(UserError, match=r"no row with id 1: it is in quarantine \(response is 9 tokens long\)"):
        read_rows(str(tmp_path), ["1"], 1)
    with pytest.raises(UserError, match="has no data/train"):
        read_rows(str(tmp_path / "nothing"), [], 1)
    exported = folder_of(
        tmp_path / "exported",
        causal_columns(pa.table({"input_ids": [[1]], "labels": [[1]]})),
        {"stage": "export", "input": "runs/masked"},
    )
    with pytest.raises(UserError, match="have no ids, .*look at runs/masked, which it was made from"):
        read_rows(exported, [], 1)


def test_an_id_that_is_there_more_than_once_is_shown_from_every_shard(tmp_path):
    write_folder(str(tmp_path), pairs=True)
    again = rewrite(str(tmp_path), lambda table: table)
    shard = storage.list_shards(str(tmp_path))[0]
    storage.write_table(storage.read_table(shard), shard.replace("000.parquet", "999.parquet"))
    first = storage.read_table(shard)["id"][0].as_py()
    assert [row["id"] for row in read_rows(str(tmp_path), [first], 1)] == [first, first]
    assert len(read_rows(str(tmp_path), [], len(again) + 1)) == len(again) + 1


def test_json_has_the_texts_beside_the_row(tmp_path, capsys):
    write_folder(str(tmp_path), pairs=True)
    [row] = json.loads(shown([str(tmp_path), "--row", "p2", "--json"], capsys))["rows"]
    expected = scored_pairs(8)[2]
    assert row["chosen_ids"] == expected["chosen_ids"] and len(row["chosen_tokens"]) == len(row["chosen_ids"])
    np.testing.assert_allclose(row["rejected_adaptation"], expected["rejected_adaptation"], rtol=1e-6)


def test_rows_cannot_steer_the_terminal(tmp_path, capsys):
    pair = {"row_id": 0, "id": "[red]x[/red]\x1b[2J", "prompt": "\x1b]0;title\x07", "chosen": "a\r\nb", "rejected": ""}
    pair |= {"chosen_score": 1.0, "rejected_score": 0.0}
    out = shown([folder_of(tmp_path, pa.Table.from_pylist([pair], schema=schema.PAIRS))], capsys)
    assert "\x1b" not in out and "\x07" not in out and "[red]x[/red]\\x1b[2J" in out and "a\\x0d\nb" in out


def test_marked_joins_runs():
    from alphatoken.row_view import Part, Token

    tokens = [Token("p", False), Token("a", True), Token("b", True, False), Token("c", True, False), Token("d", True)]
    assert marked(Part("", tokens)) == "pa[-bc-]d"
