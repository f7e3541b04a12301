"""The device mesh: its devices and their order, and compiler options for a train step on it."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mlpmem_jax.core.errors import ConfigError

AXES = ("slice", "fsdp", "tensor")
"""Mesh axes: data parallel between slices, fully sharded data parallel, tensor parallel."""

_BARRIER_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # missing heartbeats, not this timeout, detect a dead process


def make_mesh(slice_: int = 1, fsdp: int = -1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of shape [slice, fsdp, tensor]; one of the sizes may be -1, meaning all remaining devices.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [slice_, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or len(devices) % known:
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {slice_} x {fsdp} x {tensor} does not fit {len(devices)} devices; "
            "at most one of the sizes may be -1, and the product must divide the number of devices"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"config.mesh: slice x fsdp x tensor = {' x '.join(map(str, sizes))} uses {int(np.prod(sizes))} of "
            f"{len(devices)} devices; set one of the sizes to -1 to use them all"
        )
    types = (AxisType.Auto,) * len(AXES)
    arranged = _on_wires(devices, sizes) if devices[0].platform == "tpu" else np.asarray(devices).reshape(sizes)
    return Mesh(arranged, AXES, axis_types=types)


def _on_wires(devices: list, sizes: list[int]) -> np.ndarray:
    """Orders TPUs so that neighbors on the mesh are physical neighbors.

    TPU slices are connected only by the data-center network, so only the mesh axis `slice` spans them; it may also
    divide each of them further.
    """
    tpu_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if tpu_slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices=devices, allow_split_physical_axes=True)
    if sizes[0] % tpu_slices:
        raise ConfigError(
            f"config.mesh.slice: {sizes[0]} is not a multiple of the {tpu_slices} TPU slices; only this axis may run "
            "between slices"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // tpu_slices, *sizes[1:]),
        (tpu_slices, 1, 1),
        devices=devices,
        allow_split_physical_axes=True,
    )


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Compiler options for a train step on TPUs, which let collectives overlap with matrix products.

    By default v5e does not overlap sums of gradients with anything. v5p and v6e wait for every collective, unless it
    runs on their sparse cores; their compilers reject v5e's options, and v4's compiler has neither.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind in ("TPU v5 lite", "TPU v5e"):
        return {"xla_enable_async_all_reduce": True, "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True}
    if kind in ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"):
        kinds = ("all_gather", "reduce_scatter", "all_reduce")
        return {f"xla_tpu_enable_sparse_core_collective_offload_{name}": True for name in kinds}
    return {}


def barrier(name: str) -> None:
    """Waits until every process of the job arrives, even if that takes days.

    This uses the job's coordinator, not the devices: a collective would time out if a process is late.

    Raises:
      JaxRuntimeError: a process died in the meantime.
    """
    if jax.process_count() == 1:
        return
    import orbax.checkpoint as ocp  # slow to import, and needed only with several processes

    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_BARRIER_TIMEOUT_MS)
