"""TPU slices on Kubernetes (GKE): one JobSet, one Job per slice, one pod per host. Submitted with `kubectl apply`."""

from __future__ import annotations

import argparse
import re
import sys

import yaml

from mlpmem_jax.core import accelerators
from mlpmem_jax.core.errors import UserError

from . import job

_EXAMPLE = (
    "python -m launch.jobset --name=memory --accelerator=v5p-128 --image=IMAGE \\\n"
    "      --config=configs/wikitext103_gpt2_large.py --config.workdir=gs://BUCKET/memory --dry_run"
)
_COMMAND = ["kubectl", "apply", "-f", "-"]
_CONFIG_FOLDER = "/etc/mlpmem"
_COORDINATOR_PORT = 8482  # for jax.distributed, set in its environment
_ENVIRONMENT = {
    # Hosts, ids and the coordinator come from GKE's variables (TPU_WORKER_*, MEGASCALE_*).
    "MLPMEM_DISTRIBUTED": "1",
    "JAX_COORDINATOR_PORT": str(_COORDINATOR_PORT),
    # A host whose chips cannot be opened must fail, not train on its CPU.
    "JAX_PLATFORMS": "tpu,cpu",
}
_PORTS = (8471, _COORDINATOR_PORT, 8080)  # TPU runtime, coordinator, transfers between slices
_LONGEST_POD_SUFFIX = len("-slice-999-9999-abcde")  # a pod's name must fit the 63 characters of a host name


def _failure_policy(max_restarts: int) -> dict:
    """Restarts the whole set after a failure; does not count restarts after a preemption; none after a user error.

    The patterns identify which rule of `_pod_failure_policy` ended the Job (JobSet 0.10 or later).
    """
    return {
        "maxRestarts": max_restarts,
        # No pod of the new attempt may connect to the coordinator of the old one.
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["rule at index 0$"],
            },
            {
                "name": "userError",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["rule at index 1$"],
            },
        ],
    }


def _pod_failure_policy() -> dict:
    """What ends the Job: a preempted pod, a user error, any other failure. Pods that left because they lost another are
    replaced: what happened to that other one decides. They alone count towards the Job's `backoffLimit`."""

    def on_exit(action: str, operator: str, code: int) -> dict:
        return {"action": action, "onExitCodes": {"containerName": "mlpmem", "operator": operator, "values": [code]}}

    return {
        "rules": [
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            on_exit("FailJob", "In", job.USER_ERROR),
            on_exit("Count", "In", job.STOPPED),
            on_exit("FailJob", "NotIn", job.STOPPED),
        ]
    }


def _pod(options: argparse.Namespace, tpu: accelerators.Slice) -> dict:
    """The pod template: one process per host, with all its chips."""
    chips = {"google.com/tpu": tpu.chips_per_host}
    disk = {} if options.disk is None else {"ephemeral-storage": f"{options.disk}Gi"}
    environment = job.environment(_ENVIRONMENT, options.env)
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.GRACE_SECONDS,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.generation.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "containers": [
            {
                "name": "mlpmem",
                "image": options.image,
                "args": [options.stage, f"--config={_CONFIG_FOLDER}/config.py"],
                # Kubernetes replaces $(NAME) in a value, and $$ by $.
                "env": [{"name": name, "value": value.replace("$", "$$")} for name, value in environment.items()],
                "envFrom": [{"secretRef": {"name": name}} for name in options.secret],
                "ports": [{"containerPort": port} for port in _PORTS],
                "resources": {"requests": chips | disk, "limits": chips},
                "volumeMounts": [{"name": "config", "mountPath": _CONFIG_FOLDER, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": options.name}}],
    }
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.spot:
        spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}]
    if options.slices > 1:  # transfers between slices bypass the pods' virtual network
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return {"spec": spec}


def manifests(options: argparse.Namespace, tpu: accelerators.Slice, config_file: str) -> list[dict]:
    """The ConfigMap with the config, and the JobSet that runs it."""
    metadata = {"name": options.name, "namespace": options.namespace}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,  # a restart must use the same config as the first attempt
        "data": {"config.py": config_file},
    }
    slice_job = {
        "completionMode": "Indexed",
        "completions": tpu.hosts,
        "parallelism": tpu.hosts,
        # All hosts may lose another one once, with nothing to show for it; a second time is a failure of the JobSet.
        "backoffLimit": tpu.hosts,
        "podFailurePolicy": _pod_failure_policy(),
        "template": _pod(options, tpu),
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": dict(metadata),
        "spec": {
            # Hosts look up the coordinator by name before any of them is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": _failure_policy(options.max_restarts),
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": slice_job}}],
        },
    }
    if tpu.hosts > 1:  # a node pool is one slice; a Job's pods must not be spread over two
        job_set["metadata"]["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return [config_map, job_set]


class _Dumper(yaml.SafeDumper):
    """Writes multi-line texts as literal blocks."""

    def ignore_aliases(self, data):
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    job.check_words(options, "namespace")
    if options.disk is not None and options.disk < 1:
        raise UserError(f"--disk={options.disk}: expected 1 or more")
    for name in options.secret:
        if not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", name):
            raise UserError(f"--secret={name}: expected the name of a Secret: lowercase letters, digits, '-' and '.'")
    tpu, config = job.read_tpu_job(options, overrides, longest_name=63 - _LONGEST_POD_SUFFIX)
    if options.slices > 1 and tpu.hosts == 1:
        raise UserError(
            f"--slices={options.slices}: GKE connects only multi-host slices, and {tpu} is not one; the smallest that "
            f"can be connected: {next(other for other in accelerators.slices(tpu.generation) if other.hosts > 1)}"
        )
    documents = manifests(options, tpu, job.config_file(config, options.config, overrides))
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True)
    print(f"{options.slices} x {tpu}, {tpu.machine_type}: {' '.join(_COMMAND)}", file=sys.stderr)
    if options.dry_run:
        print(text, end="")
        return 0
    if code := _delete_failed(options.name, options.namespace):
        return code
    return job.send(_COMMAND, text)


def _delete_failed(name: str, namespace: str) -> int:
    """Deletes a failed JobSet of that name, which `kubectl apply` would leave as it is, and its config.

    Returns:
      kubectl's exit code, 0 if there was none.
    """
    which = [name, f"--namespace={namespace}", "--ignore-not-found"]
    if job.ask(["kubectl", "get", "jobset", *which, "--output=jsonpath={.status.terminalState}"]) != "Failed":
        return 0
    print(f"the failed JobSet {name} is replaced", file=sys.stderr)
    return job.send(["kubectl", "delete", "jobset,configmap", *which, "--cascade=foreground"], "")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m launch.jobset`."""
    parser = job.parser("jobset", __doc__, _EXAMPLE)
    job.add_tpu_options(parser)
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="Secret of the namespace whose entries become environment variables, e.g. HF_TOKEN; may be repeated",
    )
    parser.add_argument(
        "--disk", type=int, metavar="GIB", help="disk of the node that a pod requests, e.g. for indices (default: none)"
    )
    parser.add_argument("--namespace", default="default", help="Kubernetes namespace (default: default)")
    job.run(parser, _launch, arguments)


if __name__ == "__main__":
    main()
