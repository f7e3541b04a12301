"""Installation of mlpmem_jax. `make quickstart` and `make test` call this for you."""

import pathlib

import setuptools

EXTRAS = {
    # PyTorch and transformers: parity tests, weights in and out.
    "torch": ["torch>=2.6,<2.14", "transformers>=5.0,<6"],
    # Data sets, tokenizers and weights by their Hugging Face name, and Parquet files.
    "hub": ["datasets>=4.0,<6", "huggingface_hub>=1.0", "pyarrow>=18"],
    # Working directories, corpora and tokenizers in buckets: gs:// and s3://.
    "gcs": ["gcsfs>=2026.4"],
    "s3": ["s3fs>=2026.4"],
    # Weights and tokenizers of llama.cpp's files.
    "gguf": ["gguf>=0.17,<1"],
    # The compiler for TPUs, for `mlpmem plan` on machines without one. Versions that jax 0.10 and 0.11 were seen with.
    "plan": ["libtpu>=0.0.40,<0.1"],
    # The reference's way of searching and weights in int8, for `mlpmem benchmark`.
    "bench": ["faiss-cpu>=1.10,<2", "torchao>=0.17,<0.19"],
    # Retrieval by words, for `mlpmem compare`; and by a sentence encoder.
    "rag": ["bm25s>=0.3,<0.4"],
    "dense": ["sentence-transformers>=5,<7"],
    # LoRA as a folder of adapters.
    "peft": ["peft>=0.15,<1"],
    # Any task of lm-evaluation-harness, for `mlpmem score`.
    "harness": ["lm_eval>=0.4.9,<0.5"],
    # Packages whose documentation makes a larger corpus: config.corpus.packages.
    "library": ["botocore", "sympy", "scikit-learn", "pandas", "statsmodels", "networkx", "django"],
    "test": [
        "accelerate>=1.0,<2",  # what transformers reads GGUF files with
        "pytest>=8.3,<10",
        "hypothesis>=6.130,<7",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.11,<0.18",
        "kubernetes-validate>=1.30",
    ],
}

setuptools.setup(
    name="mlpmem_jax",
    version="0.1.0",
    description="Pretrain MLP Memories for language models on TPU pods, GPUs and CPUs",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # In a wheel, ready configs and launchers are parts of the package: a user's own `configs` must not meet ours.
    packages=[
        *setuptools.find_packages(include=["mlpmem_jax*"]),
        "mlpmem_jax.ready.configs",
        "mlpmem_jax.ready.configs.sweeps",
        "mlpmem_jax.launch",
    ],
    package_data={"mlpmem_jax.comparison.tasks": ["*.toml"]},
    package_dir={"mlpmem_jax.ready.configs": "configs", "mlpmem_jax.launch": "launch"},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.5,<0.13",
        "optax>=0.2.7,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "tensorstore>=0.1.80,<0.2",
        # ScaNN's wheels are for Linux on x86-64 alone; elsewhere the exact backend serves.
        "scann>=1.4.2,<1.5; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "grain>=0.2.15,<0.3",
        "ml_collections>=1.1,<2",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.6,<0.9",
        "etils[epath]>=1.13,<2",
        "numpy>=2.1,<3",
        "threadpoolctl>=3.5,<4",
        "packaging>=24",
        "scipy>=1.15,<2",
        "matplotlib>=3.10,<4",
        "rich>=14,<16",
        "tensorboardX>=2.6.2,<3",
        "zstandard>=0.23,<1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mlpmem=mlpmem_jax.cli:main"]},
)
