import pytest


@pytest.fixture(scope="session", autouse=True)
def cold_cache(tmp_path_factory):
    """Kernels are compiled by the code under test, not taken from an earlier run's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JTILE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield
