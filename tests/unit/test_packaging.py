"""The package imports as one namespace, from anywhere, with only its core dependencies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("routers", "parallel", "moe", "training", "compression", "conf", "launch")
MODULES = sorted(
    "gatewise." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
)
OPTIONAL = (
    "wandb",
    "deepspeed",
    "megatron",
    "transformers",
    "datasets",
    "gguf",
    "plotly",
    "optuna",
    "apex",
    "ninja",
    "pytest",
    "hypothesis",
    "scipy",
)
IMPORT_ALL = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional}:
            raise ModuleNotFoundError(f"no {{name}} here", name=name)

sys.meta_path.insert(0, Refuse())
for module in {modules}:
    importlib.import_module(module)
print("imported", len({modules}))
"""


def run_python(code: str, cwd: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_compression_is_importable_beside_the_standard_library(place: str, tmp_path: Path) -> None:
    code = "import gatewise.compression, gzip, bz2, lzma; print(gatewise.compression.__file__)"
    cwd = ROOT if place == "repository" else tmp_path
    assert Path(run_python(code, cwd).strip()) == ROOT / "compression" / "__init__.py"


def test_every_module_imports_with_only_the_core_dependencies(tmp_path: Path) -> None:
    code = IMPORT_ALL.format(optional=set(OPTIONAL), modules=MODULES)
    assert run_python(code, tmp_path).split() == ["imported", str(len(MODULES))]


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, gatewise.launch.cli, gatewise.conf.compose, gatewise.launch.train\n"
        "gatewise.conf.compose.load_train_config(['experiment=tiny'])\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code, tmp_path).strip() == "False"


def test_every_module_is_known() -> None:
    assert "gatewise.launch.cli" in MODULES
    assert "gatewise.moe" in MODULES
