"""`gatewise doctor`: what this installation can do, what is missing and how to get it."""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch import machine
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import EXIT_CRASH, run_session
from gatewise.launch.usage import usage_text
from gatewise.moe.ops.build import build_library, cache_folder, find_compiler, library_path
from gatewise.training.apex_package import find_apex
from gatewise.training.config import RunConfig

__all__ = ["DoctorConfig", "run", "usage", "without_build"]


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """Settings of the doctor."""

    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True, slots=True)
class _Optional:
    """A package that gatewise uses where it is installed."""

    name: str  # of the distribution
    module: str
    gives: str
    command: str


_OPTIONAL = (
    _Optional("wandb", "wandb", "records in Weights & Biases", "pip install -e '.[wandb]'"),
    _Optional(
        "wandb-workspaces", "wandb_workspaces", "W&B dashboards", "pip install -e '.[dashboard]'"
    ),
    _Optional("deepspeed", "deepspeed", "ZeRO and a peer", "pip install -e '.[deepspeed]'"),
    _Optional("megatron-core", "megatron.core", "a peer", "pip install -e '.[megatron]'"),
    _Optional("transformers", "transformers", "checks, a peer", "pip install -e '.[hf]'"),
    _Optional("datasets", "datasets", "data.hf", "pip install datasets"),
    _Optional("plotly", "plotly", "HTML reports", "pip install -e '.[report]'"),
    _Optional("optuna", "optuna", "submit.trials", "pip install -e '.[optuna]'"),
    _Optional("ninja", "ninja", "builds of DeepSpeed's operators", "pip install ninja"),
)


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    return usage_text(
        "doctor [--build]",
        "Show versions, processor, backends and optional packages; --build compiles the kernels.",
        field_table(load_settings(DoctorConfig, without_build(arguments))),
    )


def run(arguments: Sequence[str]) -> int:
    """Print the findings and store them in `result.json`; finding something missing is no error.

    With --build the CPU kernels are compiled first, and not being able to is an error.
    """
    rest = without_build(arguments)
    config = load_settings(DoctorConfig, rest)
    folder = RunFolder.choose(config.run.dir, "doctor")
    return run_session("doctor", folder, lambda: _examine(build=len(rest) < len(arguments)))


def without_build(arguments: Sequence[str]) -> list[str]:
    """Return the settings among the arguments."""
    return [word for word in arguments if word != "--build"]


def _examine(*, build: bool) -> dict[str, Any]:
    kernels = _kernels(build=build)
    found: dict[str, Any] = {
        "versions": machine.versions(),
        "cpu": machine.cpu_model(),
        "cores": machine.available_cores(),
        "memory_mb": machine.memory_mb(),
        "cpu_features": machine.cpu_features(),
        "allocator": machine.allocator(),
        "compiler": find_compiler(),
        "kernels": kernels,
        "backends": _backends(),
        "optional": {package.name: _look_for(package) for package in _OPTIONAL},
    }
    found["optional"]["apex"] = _look_for_apex()
    _show(found)
    if build and "problem" in kernels:
        found |= {"exit": EXIT_CRASH, "error": f"the kernels were not built: {kernels['problem']}"}
    return found


def _kernels(*, build: bool) -> dict[str, Any]:
    """Say where the compiled CPU kernels are, after compiling them if asked to."""
    found: dict[str, Any] = {"library": None, "instructions": []}
    try:
        compiler, folder = find_compiler(), cache_folder()
        if compiler is None:
            raise RuntimeError("no C++ compiler found; install g++ or clang++")
        if build:
            build_library(compiler, folder)
        library = library_path(compiler, folder)
        if library.exists():
            found["library"] = str(library)
            found["instructions"] = _instructions()
    except (OSError, RuntimeError, ImportError) as error:
        found["problem"] = " ".join(str(error).split())
    return found


def _instructions() -> list[str]:
    """Return what products with packed weights are compiled for; imports torch."""
    from gatewise.moe.ops.native import load_kernels
    from gatewise.moe.ops.native_packed import PackedKernels

    kernels = load_kernels()
    return [found.name for found in PackedKernels.sets(kernels.library)] if kernels else []


def _backends() -> dict[str, Any]:
    """Ask torch what it was built with; the only place of this command that imports it."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return {"error": f"torch cannot be imported: {' '.join(str(error).split())}"}
    available = dist.is_available()
    return {
        "gloo": available and dist.is_gloo_available(),
        "nccl": available and dist.is_nccl_available(),
        "mpi": available and dist.is_mpi_available(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "openmp": torch.backends.openmp.is_available(),
    }


def _gpus() -> list[str]:
    import torch

    if not torch.accelerator.is_available():
        return []
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return [str(module.get_device_name(n)) for n in range(torch.accelerator.device_count())]


def _look_for(package: _Optional) -> dict[str, Any]:
    found: dict[str, Any] = {"version": _version(package.name), "gives": package.gives}
    try:
        found["importable"] = importlib.util.find_spec(package.module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        found["importable"] = False
    if not found["importable"]:
        found["install"] = package.command
    return found


def _look_for_apex() -> dict[str, Any]:
    """Tell NVIDIA's Apex, which is built from source, from PyPI's package of the same name."""
    package = find_apex()
    found: dict[str, Any] = {
        "version": package.version,
        "gives": "NVIDIA's fused optimizer and norms",
        "importable": package.nvidia,
    }
    if package.problem is not None:
        found["problem"] = package.problem
    if package.unrelated:
        found["install"] = "pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"
    elif not package.nvidia:
        found["install"] = "build from github.com/NVIDIA/apex; never `pip install apex`"
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(found: Mapping[str, Any]) -> None:
    memory = found["memory_mb"]
    features = [name for name, present in found["cpu_features"].items() if present]
    rows = [(name, version or "MISSING") for name, version in found["versions"].items()]
    rows += [
        ("processor", found["cpu"]),
        ("cores", found["cores"]),
        ("memory", f"{memory['total']} MiB, {memory['available']} MiB free"),
        ("features", ", ".join(features) or "none known"),
        ("bf16 units", "yes" if {"amx_bf16", "avx512_bf16", "bf16"} & set(features) else "no"),
        ("allocator", found["allocator"]),
        ("compiler", found["compiler"] or "none: torch computes instead of kernels (install g++)"),
        ("kernels", _kernels_text(found["kernels"])),
    ]
    for name, value in found["backends"].items():
        rows.append((name, _shown(value)))
    for name, value in rows:
        print(f"{name:<16}{value}")
    print("\noptional packages")
    for name, package in found["optional"].items():
        state = package["version"] or "present" if package["importable"] else "missing"
        text = f"{name:<16}{state:<12}{package['gives']}"
        if "problem" in package:
            text += f"; {package['problem']}"
        if "install" in package:
            text += f" -> {package['install']}"
        print(text)


def _kernels_text(kernels: Mapping[str, Any]) -> str:
    if kernels["library"] is None:
        if "problem" in kernels:
            return f"none: {kernels['problem']}"
        return "not built yet: at first use, or now by gatewise doctor --build"
    packed = ", ".join(kernels["instructions"]) or "none for this processor, torch computes"
    return f"built; products with packed weights: {packed}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
