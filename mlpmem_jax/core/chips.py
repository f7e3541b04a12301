"""Published rates of TPU and GPU chips, for rooflines and utilization.

Sources are Google Cloud documentation unless stated otherwise:
  docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: peak rate, memory, interconnect, data-center network
  NVIDIA's data sheets of the A100, H100 and H200: peak rate without sparsity, memory bandwidth
  v4's links: Jouppi et al. 2023 (arXiv 2304.01433): 6 links of 50 GB/s. Its network is not published; a host of 4
  chips is assumed to have the 200 Gbit/s of a v5p host.
The documentation states a chip's interconnect as the sum of all its ports in both directions; here it is one direction
of one port. Each axis of a torus has two ports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, which is one JAX device.

    Attributes:
      flops: peak rate of bfloat16 matrix products, FLOP/s.
      hbm_bytes: memory size in bytes.
      hbm_bandwidth: memory bandwidth, bytes/s.
      link_bandwidth: bytes/s, one direction of one link to a neighbor.
      network_bandwidth: bytes/s, one direction, the chip's share of its host's data-center network.
      ring_length: an axis whose number of chips is a multiple of this is closed to a ring.
      options: further options of the topology description.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    ring_length: int
    options: Mapping[str, str]


CHIPS = {
    "v4": Chip(275e12, 32 << 30, 1200e9, 50e9, 6.25e9, 4, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 16 << 30, 819e9, 50e9, 3.125e9, 16, {}),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 100e9, 6.25e9, 4, {}),
    "v6e": Chip(918e12, 32 << 30, 1638e9, 100e9, 12.5e9, 16, {}),
}
"""Chips by generation; keys as in `core.accelerators.GENERATIONS`."""


class Rates(NamedTuple):
    """Published rates of one JAX device: bfloat16 matrix products in FLOP/s, memory in bytes/s."""

    flops: float
    bandwidth: float


_PUBLISHED = {
    "NVIDIA A100-SXM4-40GB": Rates(312e12, 1555e9),
    "NVIDIA A100-PCIE-40GB": Rates(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Rates(312e12, 2039e9),
    "NVIDIA A100 80GB PCIe": Rates(312e12, 1935e9),
    "NVIDIA H100 80GB HBM3": Rates(989.4e12, 3350e9),
    "NVIDIA H100 PCIe": Rates(756e12, 2000e9),
    "NVIDIA H100 NVL": Rates(835.5e12, 3900e9),
    "NVIDIA H200": Rates(989.4e12, 4800e9),
    "NVIDIA H200 NVL": Rates(835.5e12, 4800e9),
    **{
        kind: Rates(CHIPS[generation].flops, CHIPS[generation].hbm_bandwidth)
        for kind, generation in (
            ("TPU v4", "v4"),
            ("TPU v5 lite", "v5e"),
            ("TPU v5e", "v5e"),
            ("TPU v5", "v5p"),
            ("TPU v5p", "v5p"),
            ("TPU v6 lite", "v6e"),
            ("TPU v6e", "v6e"),
        )
    },
}


def published(device_kind: str) -> Rates | None:
    """The rates of a device by JAX's name of its kind; None if unknown, as for CPUs."""
    return _PUBLISHED.get(device_kind)
