"""Compiles for TPU slices that are not attached, with the compiler in libtpu."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from mlpmem_jax.core import native_output
from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.core.errors import UserError, require

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU machine to query for metadata
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so several processes may compile at once
}


class DoesNotFit(Exception):
    """The program does not fit a chip's memory; the text says what it would need."""


def devices(tpu: Slice, slices: int) -> list[jax.Device]:
    """The devices of some slices; programs can be compiled for them but not run.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    require("libtpu", extra="plan")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = dict(CHIPS[tpu.family].options)
    if slices > 1:
        options["num_slices"] = slices
    try:
        with _libtpu():
            devices = topologies.get_topology_desc(f"{tpu.family}:{tpu.topology}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu does not know the topology {tpu.family}:{tpu.topology}: {error}") from error
    return list(devices)


def compile_program(function, arguments: tuple, static: dict) -> tuple[str, jax.stages.Compiled]:
    """(text of the optimized HLO, the compiled program) of a jitted function, abstract and static arguments.

    The text comes from the compiler, because JAX's own reader does not know every instruction of some programs.

    Raises:
      DoesNotFit: the program needs more memory than a chip has.
    """
    with tempfile.TemporaryDirectory() as folder, _libtpu():
        try:
            compiled = function.lower(*arguments, **static).compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(_shortened(str(error))) from error
            raise
        (file,) = glob.glob(os.path.join(folder, "*.after_optimizations.txt"))
        with open(file, encoding="utf-8") as opened:
            return opened.read(), compiled


@contextlib.contextmanager
def _libtpu() -> Iterator[None]:
    """Silences libtpu, which exits at flags it does not know, and hides those of CPUs and GPUs in XLA_FLAGS from it."""
    given = os.environ.get("XLA_FLAGS")
    try:
        if given is not None:
            os.environ["XLA_FLAGS"] = re.sub(r"--xla_(cpu|gpu)_\S*", "", given)
        with native_output.silenced_standard_error():
            yield
    finally:
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def _shortened(message: str) -> str:
    used = re.search(r"Used \S+ of \S+ hbm", message)
    return used[0] if used else message.splitlines()[0][:200]
