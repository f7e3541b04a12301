"""Manifests against the published schemas of Kubernetes and of JobSet."""

import pathlib
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from jax._src import clusters

from launch import jobset
from mlpmem_jax.core import config_files
from mlpmem_jax.core.errors import Stopped

ROOT = pathlib.Path(__file__).parents[1]
JOBSET_CRD = ROOT.parent / "shared" / "schemas" / "jobset-crd.yaml"
KUBERNETES = "1.31"
BATCH = [f"--config.{name}.batch_sequences=256" for name in ("datastore", "training", "base.training")]
BATCH += ["--config.mesh.rules.embed="]  # parameters of these widths are not divided by so many devices
CASES = {
    "one host": ["--accelerator=v6e-8"],
    "comparison": ["--accelerator=v6e-8", "--stage=compare"],
    "one slice": ["--accelerator=v5litepod-256", "--namespace=research", "--max_restarts=3"],
    "two slices": [
        *("--accelerator=v5p:4x4x8", "--slices=2", "--spot", "--service_account=writer", "--stage=train"),
        *("--config.mesh.slice=2", "--env=TMPDIR=/scratch", "--secret=huggingface", "--disk=90"),
    ],
}


@pytest.fixture(autouse=True)
def no_real_commands(tmp_path, monkeypatch):
    """A test that fails must not reach a real kubectl of the machine it runs on."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture
def manifests(capsys):
    def make(*arguments):
        base = ["--name=memory", "--image=eu-docker.pkg.dev/p/r/mlpmem:1", f"--config={ROOT}/configs/default.py"]
        with pytest.raises(SystemExit) as end:
            jobset.main([*base, "--config.workdir=gs://bucket/memory", *BATCH, "--dry_run", *arguments])
        assert end.value.code == 0, capsys.readouterr().err
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return make


@pytest.mark.parametrize("case", CASES)
def test_config_map_job_and_pod_follow_the_schemas_of_kubernetes(manifests, case):
    config_map, job_set = manifests(*CASES[case])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    job["spec"] = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "host"}, "spec": job["spec"]["template"]["spec"]}
    for resource in (config_map, job, pod):
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    pod["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def closed(schema):
    """The schema with unknown fields refused, as the API server's strict validation does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.fixture(scope="module")
def jobset_schema():
    if not JOBSET_CRD.exists():
        pytest.skip(f"JobSet's own schema is not here: {JOBSET_CRD}")
    with JOBSET_CRD.open() as file:
        versions = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    [version] = [version for version in versions if version["name"] == "v1alpha2"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("case", CASES)
def test_job_sets_follow_the_schema_of_jobset(manifests, jobset_schema, case):
    _, job_set = manifests(*CASES[case])
    jobset_schema.validate(job_set)
    job_set["spec"]["failurePolicy"]["restartStrategy"] = "Sometimes"
    job_set["spec"]["networks"] = {}
    errors = {error.validator for error in jobset_schema.iter_errors(job_set)}
    assert errors == {"enum", "additionalProperties"}


def test_a_slice_is_one_indexed_job_with_a_pod_on_each_host(manifests):
    config_map, job_set = manifests(*CASES["one slice"])
    [replicated] = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] == 1
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 64, 64)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    port = environment.pop("JAX_COORDINATOR_PORT")  # see below
    assert environment == {"MLPMEM_DISTRIBUTED": "1", "JAX_PLATFORMS": "tpu,cpu"}
    assert int(port) in [port_of["containerPort"] for port_of in container["ports"]]
    assert job_set["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert job_set["metadata"]["annotations"]
    assert job_set["metadata"]["namespace"] == config_map["metadata"]["namespace"] == "research"
    assert "hostNetwork" not in pod


def test_slices_are_replicas_on_the_hosts_network(manifests):
    _, job_set = manifests(*CASES["two slices"])
    [replicated] = job_set["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert replicated["replicas"] == 2
    assert replicated["template"]["spec"]["completions"] == 32
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "writer"
    assert pod["containers"][0]["args"] == ["train", "--config=/etc/mlpmem/config.py"]
    requested = {"google.com/tpu": 4, "ephemeral-storage": "90Gi"}
    assert pod["containers"][0]["resources"] == {"requests": requested, "limits": {"google.com/tpu": 4}}


def test_variables_and_secrets_reach_the_container(manifests):
    """Kubernetes replaces $(NAME) in a value; $$ stands for $."""
    given = ["--env=XLA_FLAGS=--a=$(HOME) --b: 'c' #d", "--env=MLPMEM_JOIN_SECONDS=1800"]
    _, job_set = manifests(*CASES["one slice"], *given, "--secret=huggingface", "--secret=others")
    [container] = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["XLA_FLAGS"] == "--a=$$(HOME) --b: 'c' #d"
    assert environment["MLPMEM_JOIN_SECONDS"] == "1800"
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["huggingface", "others"]


@pytest.mark.parametrize("wrong", ["--secret=HF_TOKEN=x", "--env=MLPMEM_DISTRIBUTED=0", "--disk=0"])
def test_what_no_pod_can_have_is_refused(capsys, wrong):
    arguments = ["--name=a", "--image=I", f"--config={ROOT}/configs/default.py", "--config.workdir=gs://b/r"]
    with pytest.raises(SystemExit, match="2"):
        jobset.main([*arguments, "--accelerator=v6e-8", wrong, "--dry_run"])
    assert f"error: {wrong}: " in capsys.readouterr().err


def test_one_host_slices_are_not_joined(capsys):
    arguments = ["--name=a", "--image=I", f"--config={ROOT}/configs/default.py", "--config.workdir=gs://b/r"]
    with pytest.raises(SystemExit, match="2"):
        jobset.main([*arguments, "--accelerator=v6e-8", "--slices=2", "--config.mesh.slice=2", "--dry_run"])
    assert "v6e-16" in capsys.readouterr().err


def test_failures_restart_preemptions_are_free_and_user_errors_end(manifests):
    _, job_set = manifests(*CASES["one slice"])
    policy = job_set["spec"]["failurePolicy"]
    pod_rules = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (3, "BlockingRecreate")
    actions = {rule["onJobFailureMessagePatterns"][0]: rule["action"] for rule in policy["rules"]}
    assert pod_rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert actions["rule at index 0$"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert pod_rules[1]["onExitCodes"]["values"] == [2]
    assert actions["rule at index 1$"] == "FailJobSet"
    assert (pod_rules[2]["onExitCodes"]["values"], pod_rules[2]["action"]) == ([Stopped.exit_code], "Count")


def fate(job, exits):
    """What the Job controller makes of pods that ended, (exit code, whether disrupted) each, by its documentation.

    The first rule that a pod matches decides. Those that count fail the Job where they are more than `backoffLimit`.
    """

    def matches(rule, code, disrupted):
        codes = rule.get("onExitCodes")
        return disrupted if codes is None else (code in codes["values"]) == (codes["operator"] == "In")

    rules, counted = list(enumerate(job["podFailurePolicy"]["rules"])), 0
    for pod in exits:
        index, action = next(((index, rule["action"]) for index, rule in rules if matches(rule, *pod)), (None, "Count"))
        if action == "FailJob":
            return f"PodFailurePolicy: rule at index {index}"
        counted += action == "Count"
    return "BackoffLimitExceeded" if counted > job["backoffLimit"] else "replaced"


@pytest.mark.parametrize(
    ("exits", "end"),
    [
        (63 * [(75, False)] + [(137, True)], "RestartJobSetAndIgnoreMaxRestarts"),  # one preempted, the others lost it
        ([(75, False), (75, True)], "RestartJobSetAndIgnoreMaxRestarts"),
        ([(75, False), (2, False)], "FailJobSet"),
        ([(75, False), (1, False)], "RestartJobSet"),
        ([(137, False)], "RestartJobSet"),  # out of memory
        (64 * [(75, False)], "replaced"),  # the network failed once
        (65 * [(75, False)], "RestartJobSet"),  # and again: no end of it
    ],
)
def test_lost_processes_are_replaced_once_and_what_failed_decides(manifests, exits, end):
    _, job_set = manifests(*CASES["one slice"])
    actual = fate(job_set["spec"]["replicatedJobs"][0]["template"]["spec"], exits)
    if actual != "replaced":
        reason, _, message = actual.partition(": ")
        matching = (
            rule["action"]
            for rule in job_set["spec"]["failurePolicy"]["rules"]
            if reason in rule["onJobFailureReasons"] and re.search(rule["onJobFailureMessagePatterns"][0], message)
        )
        actual = next(matching, "RestartJobSet")  # JobSet's own default, which counts
    assert actual == end


def test_jax_coordinates_on_the_port_that_it_is_told(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost")
    monkeypatch.setattr(clusters.GkeTpuCluster, "is_env_present", classmethod(lambda cls: True))
    address, *_ = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, 2, 1, [0], None, 5)
    assert address == "localhost:1234"


def test_the_pods_find_the_config_that_was_checked(manifests, tmp_path):
    config_map, job_set = manifests(*CASES["one slice"], "--config.targets.k=77")
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert config_map["immutable"] is True
    assert pod["volumes"] == [{"name": "config", "configMap": {"name": config_map["metadata"]["name"]}}]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/etc/mlpmem"
    file = tmp_path / "config.py"
    file.write_text(config_map["data"]["config.py"])
    assert config_files.read(str(file), []).targets.k == 77


@pytest.fixture
def kubectl(monkeypatch, tmp_path):
    """Makes a stand-in that knows one JobSet, in a state that `get` prints; returns what it was called with."""

    def make(state: str, delete: int = 0):
        fake = tmp_path / "kubectl"
        fake.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n'
            f"case $1 in get) printf '{state}';; delete) exit {delete};; "
            f"apply) /bin/cat > {tmp_path}/sent; exit 3;; esac\n"
        )
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SystemExit) as end:
            jobset.main([*SENT, "--namespace=n"])
        return end.value.code, [line.split() for line in (tmp_path / "words").read_text().splitlines()]

    return make


SENT = ["--name=a", "--image=I", "--accelerator=v5e-16", f"--config={ROOT}/configs/default.py"]
SENT += ["--config.workdir=gs://b/r"]


@pytest.mark.parametrize("state", ["", "Completed"])
def test_without_dry_run_the_manifests_go_to_kubectl(kubectl, tmp_path, capsys, state):
    with pytest.raises(SystemExit, match="0"):
        jobset.main([*SENT, "--namespace=n", "--dry_run"])
    code, [_, applied] = kubectl(state)
    assert (code, applied) == (3, ["apply", "-f", "-"])
    assert (tmp_path / "sent").read_text() == capsys.readouterr().out


def test_a_failed_job_set_is_replaced(kubectl):
    """`kubectl apply` would leave it as it is."""
    code, [asked, deleted, applied] = kubectl("Failed")
    assert asked[:4] == ["get", "jobset", "a", "--namespace=n"]
    assert deleted[:4] == ["delete", "jobset,configmap", "a", "--namespace=n"]
    assert (code, applied[0]) == (3, "apply")


def test_nothing_is_sent_if_a_failed_job_set_cannot_be_deleted(kubectl):
    code, calls = kubectl("Failed", delete=4)
    assert (code, [words[0] for words in calls]) == (4, ["get", "delete"])
