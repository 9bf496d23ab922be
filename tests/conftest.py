import os

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the tests marked `full`: minutes more, little new")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # else xdist starts files with many tests first, however quick
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    import torch

    if not config.getoption("--full"):
        left = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in set(left)]
        config.hook.pytest_deselected(items=left)

    # Files with slow tests first, so that no worker ends with a long one alone.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker():
    """Where test processes share the cores: more threads for tiny tensors only wait for one another."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def local_ray():
    """One private Ray for all tests that need it."""
    import ray

    from pipelines.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer and the ChatML template, saved as a folder."""
    from tiny_models import tiny_model
    from tiny_tokenizers import CHATML, byte_level

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    tokenizer = byte_level(CHATML)
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
