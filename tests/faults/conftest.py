import pytest


@pytest.fixture(scope="session")
def bench(local_ray, tmp_path_factory):
    """Inputs and one undisturbed run, for all tests of faults."""
    from tests.faults.harness import Bench

    return Bench(tmp_path_factory.mktemp("faults"), rows=60)


@pytest.fixture(scope="session")
def pair_bench(local_ray, bench, tmp_path_factory):
    from tests.faults.harness import Bench

    return Bench(tmp_path_factory.mktemp("pair-faults"), rows=40, pairs=True, model=bench.model)
