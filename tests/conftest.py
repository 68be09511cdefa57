"""What every test shares: the markers slow and gpu, optional real data, tools as modules, an empty datasets folder."""

import importlib.util
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

REPO_ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    """Set up the process before any test module, and with it Detectron2, is imported."""
    # Detectron2 reads this when it registers its builtin datasets. Tests must not write into the user's folder.
    datasets = tempfile.TemporaryDirectory(prefix="d2_objssl-datasets-")
    config.add_cleanup(datasets.cleanup)
    os.environ["DETECTRON2_DATASETS"] = datasets.name
    # Tools and ranks started as processes of their own import this checkout, as the tests themselves do.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # a shell's job in the background; children would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # get_num_threads: honours OMP_NUM_THREADS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = []
    if not config.getoption("--runslow"):
        skips.append(("slow", pytest.mark.skip(reason="slow: needs --runslow")))
    if not torch.cuda.is_available():
        skips.append(("gpu", pytest.mark.skip(reason="needs a CUDA device")))
    for item in items:
        for marker, skip in skips:
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let what a test says of file names that are no UTF-8 travel between the processes of pytest-xdist."""
    return _without_surrogates((yield))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_surrogates(v) for v in value)
    return value


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of small real datasets (read-only), from D2_OBJSSL_TEST_DATA; skips the test where there is none."""
    folder = Path(os.environ.get("D2_OBJSSL_TEST_DATA", REPO_ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data in {folder} (set D2_OBJSSL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def reference_values() -> Callable[[str], Path]:
    """Finds NAME.npz with values that released code computed, in D2_OBJSSL_REFERENCE_VALUES; skips where there is none."""
    folder = Path(os.environ.get("D2_OBJSSL_REFERENCE_VALUES", REPO_ROOT / ".." / "shared" / "golden")).resolve()

    def find(name: str) -> Path:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"no reference values in {path} (set D2_OBJSSL_REFERENCE_VALUES)")
        return path

    return find


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """Imports `tools/<name>.py`: the folder is no package, and another `tools` may be installed."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, REPO_ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Gives the process its numbers of threads back: benchmarks set them."""
    import cv2

    before = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.fixture
def catalog() -> Iterator[None]:
    """Removes from the catalogs what a test registers."""
    # Not above: the package reads the datasets folder, which pytest_configure sets, when it is imported.
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
