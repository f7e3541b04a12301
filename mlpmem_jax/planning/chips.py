"""What one chip of each TPU generation can do: the published figures that a roofline is made of.

Sources, Google Cloud documentation where nothing else is said:
  docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: peak rate, memory, interconnect, data-center network
  v4's links: Jouppi et al. 2023 (arXiv 2304.01433): 6 links of 50 GB/s. Its network is not published; a host of 4
  chips is taken to have the 200 Gbit/s of a v5p host.
The documentation gives the interconnect of a chip as the sum of all its ports in both directions; here it is one
direction of one port. Each axis of a torus has two ports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, which is one JAX device.

    Attributes:
      flops: peak of bfloat16 matrix products, FLOP/s.
      hbm_bytes: size of its memory.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s, one direction of one link to a neighbor.
      network_bandwidth: bytes/s, one direction, the chip's share of its host's data-center network.
      ring_length: an axis of so many chips, or of a multiple, is closed to a ring.
      options: of the topology description, beside its name.
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
"""By generation; keys as of `core.accelerators.GENERATIONS`."""
