"""Tests run on eight virtual CPU devices, with programs compiled fast; this must be said before jax is imported.

Most of the time of the tests is compilation. The optimizations of the compiler buy nothing at these sizes, and what one
process compiled another reads, also in the next run. jaxlib 0.10 compiles twice as fast with its older emitters of
fused operations, which 0.11 no longer has. Where XLA_FLAGS names a flag twice, the last one holds.

With MLPMEM_TEST_DEVICES=accelerator JAX chooses its devices: `pytest -m accelerator` runs on what is there.
"""

import importlib.metadata
import os
import pathlib

import pytest

if os.environ.get("MLPMEM_TEST_DEVICES") != "accelerator":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Of NumPy's and PyTorch's products: workers have a core each, and threads that wait for one spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLPMEM_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WHOLE = {
    *("accelerator", "comparison", "comparison_harness", "comparison_packing", "comparison_reference", "datastore"),
    *("corpus_installed_docs", "evaluation_evaluate", "evaluation_scoring", "exact_backend", "forward_benchmark"),
    *("interop_arrow", "scann_benchmark", "targets_benchmark"),
    *("export_transformers", "extending", "generation", "gguf", "gpt2_model", "huggingface", "interop_reference"),
    *("interop_stages", "interruptions", "language_model_stages", "language_models", "launch_local", "lora"),
    *("optimizer", "pipeline", "planning_plan", "processes", "scaling_points_of_sweep", "scaling_sweep"),
    *("step_benchmark", "targets", "training_loop", "training_profile"),
}
"""Files whose tests run stages or trainings, several processes, or long compilations: `make test-fast` omits them."""


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in WHOLE:
            item.add_marker(pytest.mark.whole)
