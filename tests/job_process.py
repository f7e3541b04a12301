"""One process of a job of `test_processes`: runs stages of a config; a fault may befall process 1.

python job_process.py WORKDIR STAGE,STAGE... FSDPxTENSOR BACKEND FAULT
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from test_processes import small

from mlpmem_jax import stages
from mlpmem_jax.core import artifacts, distributed
from mlpmem_jax.corpus import documents
from mlpmem_jax.inference import side_by_side
from mlpmem_jax.retrieval import targets_artifact
from mlpmem_jax.training import controls, goodput, state


class Fault(NamedTuple):
    """A signal that this process sends itself when a method returns for the n-th time.

    Attributes:
      owner, method: what is called.
      calls: n.
      signum: the signal.
      argument: count only the calls with this argument.
      then: what the process does next, if it still lives.
    """

    owner: type
    method: str
    calls: int
    signum: int
    argument: str | None = None
    then: Callable[[], None] = lambda: None

    def arm(self) -> None:
        method, calls = getattr(self.owner, self.method), 0

        def counted(owner, *arguments, **named):
            nonlocal calls
            result = method(owner, *arguments, **named)
            calls += self.argument is None or self.argument in arguments
            if calls == self.calls:
                os.kill(os.getpid(), self.signum)
                self.then()
            return result

        setattr(self.owner, self.method, counted)


def steps_told() -> None:
    """Waits until both processes have told JAX their steps, from which it finds the one at which all stop."""
    from jax._src import distributed  # seen in JAX 0.10.2; there is no public call

    client = distributed.global_state.client
    while len(client.key_value_dir_get("PREEMPTION_CURRENT_COUNTER/")) < 2:
        time.sleep(0.1)


FAULTS = {
    "killed_in_shard": Fault(artifacts.ArtifactWriter, "write_shard", 1, signal.SIGKILL),
    "killed_in_targets": Fault(targets_artifact.TargetsWriter, "write_shard", 1, signal.SIGKILL),
    "killed_in_save": Fault(state.Checkpoints, "save", 2, signal.SIGKILL),  # a thread saves
    "killed_in_step": Fault(goodput.Stopwatch, "lap", 10, signal.SIGKILL, "input wait"),
    "preempted_in_step": Fault(goodput.Stopwatch, "lap", 2, signal.SIGTERM, "input wait", steps_told),
    "preempted_in_shard": Fault(
        artifacts.ArtifactWriter, "write_shard", 1, signal.SIGTERM, then=lambda: time.sleep(120)
    ),
}
OTHER = {
    "controls": controls.run,
    "generate": lambda config: side_by_side.run(config, ["Return"], count=5),
}


def main(workdir: str, names: str, mesh: str, backend: str, fault: str) -> None:
    documents.SHARD_BYTES = 8192
    config = small(workdir, backend)
    config.mesh.fsdp, config.mesh.tensor = (int(size) for size in mesh.split("x"))
    if fault == "output_from_base":
        config.memory.output_from_base, config.tokenizer.vocab_size = True, 301
    is_second = os.environ["JAX_PROCESS_ID"] == "1"
    if is_second and fault == "late":
        time.sleep(3)
    if is_second and fault in FAULTS:
        FAULTS[fault].arm()
    with distributed.job(workdir):
        for name in names.split(","):
            OTHER[name](config) if name in OTHER else stages.run(name, config)


if __name__ == "__main__":
    main(*sys.argv[1:])
