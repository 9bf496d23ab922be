import pytest


@pytest.fixture(scope="session")
def local_ray():
    """One private Ray for all tests that need it."""
    import ray

    from pipelines.cluster import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()
