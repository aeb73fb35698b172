import pytest


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """The folder of the packs that the test recipe reads."""
    from tests.tiny.test_train import _recipe
    from tiny.train import make_packs

    folder = tmp_path_factory.mktemp("packs")
    make_packs(_recipe(folder, 1))
    return folder
