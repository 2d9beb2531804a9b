"""The built wheel: recipes travel inside it, every package is in it, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nnunet_lite
from nnunet_lite.settings import recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module_recipe_and_template(wheel: Path) -> None:
    assert wheel.name == f"nnunet_lite-{nnunet_lite.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    names = set(sizes)
    package = Path(nnunet_lite.__file__).parent
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    modules = {str(path.relative_to(package.parent)) for path in files}  # and pages, with what they are made of
    stored = {f"nnunet_lite/configs/{name}.toml" for name in recipes()}
    assert len(stored) >= 8 and stored <= names and modules <= names
    templates = {str(path.relative_to(package.parent)) for path in (package / "reporting" / "templates").iterdir()}
    assert len(templates) >= 4 and templates <= names
    assert not [name for name in names if name.startswith(("tests", "scripts", "docs", "configs/"))]
    del sizes["nnunet_lite/reporting/viewer_page/niivue.js"]  # of others, a third of the wheel
    assert sum(sizes.values()) < 660_000, "the package has grown: what can be deleted?"


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, with this environment's libraries: the command starts, and finds its own recipes."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        metadata = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "nnlite = nnunet_lite.cli:main" in archive.read(metadata).decode()
    code = (
        "import sys; sys.path.insert(0, 'site'); import nnunet_lite; from nnunet_lite import settings\n"
        "print(nnunet_lite.__file__, settings.recipe_folder()); print(*settings.recipes())\n"
        "print(settings.load_settings('cpu').recipe, settings.load_settings('batch_norm').network.norm)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).splitlines()
    assert all("site/nnunet_lite" in path for path in out[0].split())
    assert out[1].split() == list(recipes()) and out[2] == "cpu batch"
