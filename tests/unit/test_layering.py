"""The architecture's one rule on imports: they only go down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEIGHT = {
    "routers": 0,
    "parallel": 0,
    "moe": 1,
    "training": 2,
    "compression": 3,
    "conf": 4,
    "launch": 5,
}
FILES = [path for folder in HEIGHT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def violations(source: str, folder: str) -> list[str]:
    found = []
    for name in imported_names(source):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if name.startswith(".") or first in HEIGHT:
            found.append(f"{name} is not absolute: write gatewise.<folder>")
        elif first == "gatewise" and target != folder and HEIGHT[target] >= HEIGHT[folder]:
            found.append(f"{folder} imports {target}, which is not below it")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_are_absolute(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert violations(path.read_text(encoding="utf-8"), folder) == []


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("from gatewise.launch.cli import main", "conf"),
        ("def late():\n    from gatewise.parallel import dims", "routers"),
        ("import gatewise.routers.api", "parallel"),
        ("from . import config", "moe"),
        ("from training.config import TrainConfig", "launch"),
    ],
)
def test_a_planted_violation_is_found(source: str, folder: str) -> None:
    assert len(violations(source, folder)) == 1


def test_every_folder_of_the_package_has_a_height() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(HEIGHT)
