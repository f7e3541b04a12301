"""The command `mlpmem benchmark`: the rates of this machine, as a table and as JSON."""

from __future__ import annotations

import importlib
import json
import platform

import jax
import ml_collections
import rich.console
import rich.table
from etils import epath

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import library_versions
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say

PARTS = {
    "train": "mlpmem_jax.training.train_benchmark",
    "generate": "mlpmem_jax.inference.generation_benchmark",
    "batches": "mlpmem_jax.inference.batch_benchmark",
    "drafts": "mlpmem_jax.inference.trained_benchmark",
    "forward": "mlpmem_jax.retrieval.forward_benchmark",
    "targets": "mlpmem_jax.retrieval.targets_benchmark",
    "search": "mlpmem_jax.retrieval.search_benchmark",
    "scann": "mlpmem_jax.retrieval.scann_benchmark",
    "processes": "mlpmem_jax.training.process_benchmark",
    "exact": "mlpmem_jax.retrieval.exact_benchmark",
    "accelerator": "mlpmem_jax.accelerator_benchmark",
    "scoring": "mlpmem_jax.comparison.scoring_benchmark",
    "weights": "mlpmem_jax.interop.weights_benchmark",
}
_ON_REQUEST = ("batches", "exact", "accelerator", "weights")


def run(config: ml_collections.ConfigDict, parts: list[str], json_file: str | None) -> list[dict]:
    """Measures the parts, prints them and writes them to `json_file`, each row as soon as it is measured.

    By default measures all parts except those for accelerators.

    Raises:
      ConfigError: a part does not exist.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ConfigError(f"--rows={','.join(parts)}: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    machine = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu_cores": host.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        **library_versions(("jax", "jaxlib", "scann", "numpy")),
    }
    rows = []
    for part in parts or [part for part in PARTS if part not in _ON_REQUEST]:
        say(f"== benchmark: {part}")
        for row in importlib.import_module(PARTS[part]).rows(config):
            rows.append(row)
            if json_file:
                file = epath.Path(json_file)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    table = rich.table.Table(title="mlpmem benchmark", caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for column in ("row", "value", "unit", "detail"):
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for row in rows:
        table.add_row(row["name"], f"{row['value']:,.4g}", row["unit"], row["detail"])
    rich.console.Console().print(table)
    return rows
