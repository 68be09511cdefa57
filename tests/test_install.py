"""The dependencies that setup.py and requirements*.txt declare, and the installation of Detectron2."""

import ast
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
from packaging.requirements import Requirement

REPO_ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Modules that are not called as the distribution that brings them.
DISTRIBUTIONS = {
    "cv2": "opencv-contrib-python-headless",
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The arguments with which setup.py calls setuptools."""
    arguments: dict = {}
    monkeypatch.chdir(REPO_ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: arguments.update(kwargs))
    runpy.run_path("setup.py")
    return arguments


def parse(lines: list[str]) -> list[Requirement]:
    return [Requirement(text) for text in (line.split("#")[0].split("--hash")[0].strip() for line in lines) if text]


def pinned(python: str) -> dict[str, Requirement]:
    """What requirements.txt installs on one version of Python, by distribution."""
    lines = (REPO_ROOT / "requirements.txt").read_text().splitlines()
    requirements = [r for r in parse(lines) if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert len({r.name for r in requirements}) == len(requirements), f"two pins of one package apply to {python}"
    return {r.name: r for r in requirements}


def third_party_imports() -> dict[str, str]:
    """The distributions that the package and the tools import, each with one file that does."""
    found = {}
    for path in [*REPO_ROOT.glob("d2_objssl/**/*.py"), *REPO_ROOT.glob("tools/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"d2_objssl"}:
                found[DISTRIBUTIONS.get(module, module.replace("_", "-"))] = str(path.relative_to(REPO_ROOT))
    return found


def test_imports_are_declared(metadata: dict) -> None:
    groups = [metadata["install_requires"], *metadata["extras_require"].values()]
    declared = {r.name for group in groups for r in parse(group)} | {"detectron2"}
    assert {name: path for name, path in third_party_imports().items() if name not in declared} == {}


def test_required_packages_are_imported(metadata: dict) -> None:
    assert {r.name for r in parse(metadata["install_requires"])} <= third_party_imports().keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_bounds(metadata: dict, python: str) -> None:
    pins = pinned(python)
    for bound in parse(metadata["install_requires"] + metadata["extras_require"]["faiss"]):
        pin = pins[bound.name].specifier
        exact = [clause.version for clause in pin if clause.operator == "=="]
        assert pin == bound.specifier or any(version in bound.specifier for version in exact), bound.name


def test_detectron2_is_pinned_by_hash() -> None:
    lines = (REPO_ROOT / "requirements-detectron2.txt").read_text().splitlines()
    (requirement,) = parse(lines)
    assert str(requirement.specifier).startswith("==")
    assert all("--hash=sha256:" in line for line in lines if not line.startswith("#"))


def test_metadata_covers_the_package_alone(metadata: dict) -> None:
    folders = {path.parent for path in REPO_ROOT.glob("d2_objssl/**/*.py")}
    assert set(metadata["packages"]) == {".".join(folder.relative_to(REPO_ROOT).parts) for folder in folders}
    assert metadata["version"] == importlib.import_module("d2_objssl").__version__


@pytest.fixture
def installer(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("install_detectron2")


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_detectron2_scripts_do_not_reach_site_packages(installer: ModuleType, tmp_path: Path) -> None:
    record = "detectron2/__init__.py,sha256=a,0\ntools/train_net.py,sha256=b,0\nsal_detectron2-1.dist-info/RECORD,,\n"
    wheel = {"detectron2/__init__.py": "", "tools/train_net.py": "", "sal_detectron2-1.dist-info/RECORD": record}
    unpacked = write(tmp_path / "unpacked", **wheel)
    leftover = {"tools/mine.py": "kept", "sal_detectron2-1.dist-info/RECORD": "left by an interrupted install"}
    site_packages = write(tmp_path / "site-packages", **leftover)

    installer.drop_stray_package(unpacked)
    installer.move_into(unpacked, site_packages)

    assert [path.name for path in (site_packages / "tools").iterdir()] == ["mine.py"]
    assert (site_packages / "detectron2" / "__init__.py").is_file()
    text = (site_packages / "sal_detectron2-1.dist-info" / "RECORD").read_text()
    assert text == record.replace("tools/train_net.py,sha256=b,0\n", "")


def test_existing_detectron2_is_kept(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installer, "download", lambda folder: pytest.fail("downloads although Detectron2 is there"))
    monkeypatch.setattr(installer, "import_error", lambda: None)
    installer.main()
    assert "Using the Detectron2 in" in capsys.readouterr().out


def test_broken_detectron2_is_reported(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "import_error", lambda: "ModuleNotFoundError: No module named 'yacs'")
    with pytest.raises(SystemExit, match="No module named 'yacs'"):
        installer.main()
