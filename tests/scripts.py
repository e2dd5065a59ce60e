"""The scripts of benchmarks/, which are no part of the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_script"]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(name: str) -> ModuleType:
    """Load a script as a module of its own name, which no package has."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
