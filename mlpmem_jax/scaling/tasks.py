"""The tasks of a sweep: one per artifact that points share, and one per point.

A task is one verb of mlpmem in its own working directory, which has links to the artifacts of other tasks. A shared
task's folder is named by a digest of every config key that its artifact depends on, so points that need the same
artifact use the same folder, in this sweep and in later ones with the same workdir; the artifacts also check their
own origin.

    WORKDIR/shared/VERB-DIGEST/    tokens, base, datastore, targets
    WORKDIR/points/NAME/           memory and report (augmented), or continued
    WORKDIR/points.csv
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import ml_collections
from etils import epath

from mlpmem_jax.core import manifests
from mlpmem_jax.core.config import as_config_file, plain_dict
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.models import language_model
from mlpmem_jax.scaling import budgets
from mlpmem_jax.scaling.sweep import Sweep
from mlpmem_jax.training import continued

SHARED = ("tokens", "base", "datastore", "targets")
_VERBS = {"augmented": "run", "continued": "continued"}
_CHAINS = {"augmented": SHARED, "continued": SHARED[:2]}  # what each arm needs, in order of dependency


@dataclasses.dataclass(frozen=True)
class SweepTask:
    """One verb in one working directory.

    Attributes:
      name: name of its folder and job.
      verb: the mlpmem verb.
      config: its resolved config, whose workdir is the task's folder.
      needs: names of the tasks that must finish first.
      links: folder in the workdir -> the artifact that it links to.
      path_flops: training compute from here to the end of the longest chain of tasks, used to order task starts.
    """

    name: str
    verb: str
    config: ml_collections.ConfigDict
    needs: tuple[str, ...]
    links: dict[str, str]
    path_flops: float

    def prepare(self) -> str:
        """Writes links and the config into the workdir and returns the config's text."""
        workdir = epath.Path(self.config.workdir)
        for folder, target in self.links.items():
            manifests.link(workdir / folder, target)
        text = as_config_file(self.config, f"Task {self.name} of a sweep")
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.py").write_text(text)
        return text

    def is_finished(self) -> bool:
        """Whether its output exists and was produced by the same config.

        Raises:
          ArtifactError: the output folder is not an artifact, or was edited.
        """
        workdir = epath.Path(self.config.workdir)
        if self.verb == "run":
            report = workdir / "report" / "metrics.json"
            if not report.exists():
                return False
            try:
                return json.loads(report.read_bytes())["config"] == plain_dict(self.config)
            except (ValueError, KeyError, TypeError):  # damaged: it is evaluated again
                return False
        if self.verb == "continued":
            manifest = manifests.read_manifest(str(workdir / continued.FOLDER))
            origin = json.loads(json.dumps(continued.origin(self.config, *continued.of_arm(self.config))))
            return manifest is not None and manifest["sealed"] and manifest["config"] == origin
        products = (manifests.read_manifest(str(workdir / folder)) for folder in _products(self.verb, self.config))
        return all(manifest is not None and manifest["sealed"] for manifest in products)


def _products(verb: str, config: ml_collections.ConfigDict) -> list[str]:
    """Folders of the artifacts that a shared task writes."""
    if verb == "tokens":
        return ["tokens"]
    if verb == "base":
        return [
            "base",
            *(["pretrained"] if config.base.finetune_steps else []),
            *(["key_model"] if config.datastore.key_model else []),
        ]
    return [f"{verb}/{split}" for split in SPLITS]


def _digest(verb: str, config: ml_collections.ConfigDict) -> str:
    """A digest of every config key that the artifacts of a shared task depend on."""
    parts = {"corpus": plain_dict(config.corpus), "tokenizer": plain_dict(config.tokenizer)}
    if verb != "tokens":
        parts |= {"base": plain_dict(config.base), "key_model": config.datastore.key_model}
    if verb in ("datastore", "targets"):
        parts["datastore"] = plain_dict(config.datastore)
    if verb == "targets":
        parts["targets"] = plain_dict(config.targets)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def of_sweep(sweep: Sweep) -> list[SweepTask]:
    """All tasks, each after those that it needs."""
    tasks: dict[str, SweepTask] = {}
    for point in sweep.points:
        chain, links = [], {}
        for verb in _CHAINS[point.arm]:
            name = f"{verb}-{_digest(verb, point.config)}"
            config = ml_collections.ConfigDict(point.config.to_dict())
            config.workdir = str(epath.Path(sweep.workdir) / "shared" / name)
            tasks.setdefault(name, SweepTask(name, verb, config, tuple(chain[-1:]), dict(links), _flops(verb, config)))
            links |= {folder: f"{config.workdir}/{folder}" for folder in _products(verb, config)}
            chain.append(name)
        tasks[point.name] = SweepTask(point.name, _VERBS[point.arm], point.config, (chain[-1],), links, point.flops)
    return _with_paths(list(tasks.values()))


def _flops(verb: str, config: ml_collections.ConfigDict) -> float:
    """Training compute of a shared task; unknown for a base whose training length is set in epochs."""
    if verb != "base" or config.base.source != "train":
        return 0.0
    positions = config.base.training.steps * config.base.training.batch_sequences * config.base.context_length
    return 3.0 * language_model.forward_flops(budgets.base_model(config), config.base.context_length) * positions


def _with_paths(tasks: list[SweepTask]) -> list[SweepTask]:
    """The tasks with `path_flops` of whole chains instead of single tasks."""
    longest = {task.name: task.path_flops for task in tasks}
    after = dict.fromkeys(longest, 0.0)
    for task in reversed(tasks):
        longest[task.name] += after[task.name]
        for needed in task.needs:
            after[needed] = max(after[needed], longest[task.name])
    return [dataclasses.replace(task, path_flops=longest[task.name]) for task in tasks]
