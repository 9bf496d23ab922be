"""Addresses with a password in them are refused before anything is written or logged."""

import logging

import pytest

from alphatoken.config import ScoreConfig
from alphatoken.credentials import holds_secret
from alphatoken.errors import UserError
from alphatoken.generate_config import EngineOptions
from alphatoken.mask_config import MaskConfig
from jobs import mask, score

SECRET = "hush/123"
WITH_SECRETS = [
    f"s3://key:{SECRET}@bucket/rows.jsonl",
    f"sftp://user:{SECRET}@host:22/rows.jsonl",
    f"simplecache::https://user:{SECRET}@host/rows.jsonl",
    f"https://host/rows.jsonl?X-Amz-Credential=a&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/rows.jsonl?sv=2022&sig={SECRET}",
    f"https://host/rows.jsonl?token={SECRET}",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_secrets_are_seen(address):
    assert holds_secret(address)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/rows.jsonl", "abfs://container@account.dfs.core.windows.net/rows", "sftp://host:22/me@home/rows",
        "s3://bucket/a:b@c.jsonl", "https://host:8080/rows.jsonl?version=2", "user:pass@host", "C:/rows@new",
        "rows of https://a:b@c", "hf://datasets/a/b@main/rows.parquet",
    ],
)  # fmt: skip
def test_other_addresses_are_not(address):
    assert not holds_secret(address)


def test_no_configuration_takes_one():
    with pytest.raises(UserError, match="--data: the s3:// address holds a password"):
        ScoreConfig(model="m", data=["plain.jsonl", WITH_SECRETS[0]], validation=["v"], output="out")
    with pytest.raises(UserError, match="--output") as caught:
        MaskConfig(input="in", output=WITH_SECRETS[0])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_a_command_refuses_it_and_keeps_it_to_itself(address, tmp_path, capfd, caplog):
    output = tmp_path / "out"
    with caplog.at_level(logging.DEBUG):
        options = ["--model", "m", "--validation", "v.jsonl", "--output", str(output), "--data", address]
        assert score.main(options) == 2
        assert mask.main(["--input", address, "--output", str(output)]) == 2
    shown = capfd.readouterr()
    assert "give credentials through environment variables" in shown.err
    assert SECRET not in shown.out + shown.err + caplog.text
    assert not output.exists()


@pytest.mark.parametrize("name", ["hf_token", "api_key"])
def test_an_engine_takes_no_secret_from_the_settings(name):
    with pytest.raises(ValueError, match=f"{name} is a secret.*through the environment"):
        EngineOptions(engine_options={name: "abc123"})
    assert EngineOptions(engine_options={"max_num_batched_tokens": "16"}).engine_options
