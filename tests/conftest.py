"""Tests run on eight virtual CPU devices; this must be said before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("MLPMEM_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
