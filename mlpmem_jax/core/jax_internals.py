"""Every use of `jax._src`, where JAX has no public API, with the JAX version it was checked against."""

from __future__ import annotations

import jax

_PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def preemption_notice_received() -> bool:
    """Whether a process of the job has received SIGTERM, which JAX's coordination service announces to all.

    The public `multihost_utils.reached_preemption_sync_point` works only if all processes call it at the same step.
    Checked with JAX 0.10.2:  `jax._src.distributed.global_state.client`, and the key that its preemption notifier sets.
    """
    from jax._src import distributed

    try:
        distributed.global_state.client.key_value_try_get(_PREEMPTION_NOTICE)
    except jax.errors.JaxRuntimeError:  # the key does not exist
        return False
    return True
