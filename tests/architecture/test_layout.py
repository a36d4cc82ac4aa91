"""The layout holds by itself: import rules, light start-up, names, one README per folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "engines", "sandbox", "trainer")
FOLDERS = sorted(
    {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts}
)
MODULES = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))


def test_import_rules_hold() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_gateway_starts_without_torch_transformers_or_ray() -> None:
    code = (
        "import sys, gateway.main, gateway.client\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_named_like_the_standard_library(module: Path) -> None:
    if module.name != "__init__.py" and module.parent.parent == ROOT:
        assert module.stem not in sys.stdlib_module_names


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_has_a_docstring_only_init(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_folder_readme_names_each_of_its_modules(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    missing = [path.name for path in folder.glob("*.py") if path.name != "__init__.py" and path.name not in readme]
    assert not missing, f"{folder.relative_to(ROOT)}/README.md does not name {missing}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(module: Path) -> None:
    tree = ast.parse(module.read_text())
    assert ast.get_docstring(tree), "module docstring"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare
