"""Tell NVIDIA's Apex from PyPI's package of the same name; imports neither of them, nor torch.

NVIDIA's is built from its repository, and its parts can be built one by one. The `apex` on PyPI is
a toolkit for the Pyramid web framework.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ApexPackage", "find_apex"]


@dataclass(frozen=True, slots=True)
class ApexPackage:
    """What is installed under the name `apex`."""

    version: str | None = None  # of the distribution; None: none, or only on the path
    nvidia: bool = False
    unrelated: bool = False
    fused_adam: bool = False  # whether NVIDIA's was built with it
    fused_norms: bool = False

    @property
    def problem(self) -> str | None:
        """What a user should know, if anything."""
        if self.unrelated:
            version = f" {self.version}" if self.version else ""
            return (
                f"the installed package apex{version} is not NVIDIA's Apex but an unrelated one "
                "(from PyPI); torch's fused optimizer and norms are used. To use NVIDIA's: "
                "pip uninstall apex, then build it from github.com/NVIDIA/apex"
            )
        if self.nvidia and not (self.fused_adam and self.fused_norms):
            missing = "amp_C" if not self.fused_adam else "fused_layer_norm_cuda"
            return (
                f"NVIDIA's Apex is installed without {missing}; torch's own is used in its place. "
                "Build Apex with its CUDA extensions to use it"
            )
        return None


def find_apex() -> ApexPackage:
    """Look at the packages installed, without importing them."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return ApexPackage()
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return ApexPackage(version, unrelated=True)
    return ApexPackage(
        version,
        nvidia=True,
        fused_adam=_exists("amp_C"),
        fused_norms=_exists("fused_layer_norm_cuda")
        and any((folder / "normalization").is_dir() for folder in folders),
    )


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
