"""Input and output folders of the tests that train."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 unlabelled images."""
    # Not above: this file may be imported before the tests have their datasets folder (tests/conftest.py).
    from tiny_runs import write_photos

    return write_photos(tmp_path_factory.mktemp("photos") / "some photos, mine")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For the runs of a test; their checkpoints are not kept."""
    yield tmp_path
    shutil.rmtree(tmp_path)
