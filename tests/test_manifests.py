"""deploy/'s manifests against the Kubernetes API: every field, its type, and what must be there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

models = pytest.importorskip("kubernetes.client.models", reason="kubernetes is not installed")

FOLDER = Path(__file__).parents[1] / "deploy"
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}
# A number with a suffix, as resource.Quantity reads it.
QUANTITY = re.compile(r"\d+(\.\d+)?([EPTGMk]i?|Ki|m)?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
CLASSES = {
    ("v1", "PersistentVolumeClaim"): "V1PersistentVolumeClaim",
    ("v1", "Service"): "V1Service",
    ("apps/v1", "Deployment"): "V1Deployment",
    ("policy/v1", "PodDisruptionBudget"): "V1PodDisruptionBudget",
}
# Of KubeRay's RayService (ray.io/v1), as far as its guide has them. Pods in it are Kubernetes' own.
RAY_SERVICE = {"serveConfigV2", "rayClusterConfig"}
RAY_CLUSTER = {"enableInTreeAutoscaling", "rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"rayStartParams", "template", "serviceType"}
WORKER_GROUP = {*HEAD_GROUP, "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts"}


def problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """Each way in which a value is not of a kind of the API."""
    if inner := re.fullmatch(r"(?:list|List)\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{path}: no list"
            return
        for index, item in enumerate(value):
            yield from problems(item, inner[1], f"{path}[{index}]")
    elif inner := re.fullmatch(r"(?:dict|Dict)[(\[]str, (.+)[)\]]", kind):
        for name, item in value.items():
            yield from problems(item, inner[1], f"{path}.{name}")
            if path.endswith((".limits", ".requests")) and not QUANTITY.fullmatch(item):
                yield f"{path}.{name}: {item!r} is no quantity"
    elif kind in PLAIN:
        # A bool is an int to Python, and not to YAML.
        is_bool = isinstance(value, bool)
        if not isinstance(value, PLAIN[kind]) or (is_bool and kind not in ("bool", "object")):  # type: ignore[arg-type]
            yield f"{path}: {value!r} is no {kind}"
    else:
        yield from fields(value, getattr(models, kind), path)


def fields(value: Any, model: Any, path: str) -> Iterator[str]:
    """Each field that the API does not know or misses."""
    if not isinstance(value, dict):
        yield f"{path}: no object"
        return
    by_name = {api: own for own, api in model.attribute_map.items()}
    given = {}
    for name, item in value.items():
        if name not in by_name:
            yield f"{path}.{name}: unknown"
            continue
        given[by_name[name]] = item
        yield from problems(item, model.openapi_types[by_name[name]], f"{path}.{name}")
    try:
        model(**given)
    except ValueError as error:
        # The client's classes refuse what the API requires or bounds.
        yield f"{path}: {error}"


def read(text: str) -> list[Any]:
    """A file's objects, with quantities that are numbers as the text that the API makes of them."""

    def as_text(value: Any, name: str = "") -> Any:
        if isinstance(value, list):
            return [as_text(item) for item in value]
        if not isinstance(value, dict):
            return value
        if name in ("limits", "requests"):
            return {key: str(item) for key, item in value.items()}
        return {key: as_text(item, key) for key, item in value.items()}

    return [as_text(value) for value in yaml.safe_load_all(text)]


def checked(text: str) -> list[str]:
    """The problems of a file of manifests."""
    found = []
    for value in read(text):
        kind = CLASSES.get((value.get("apiVersion"), value.get("kind")))
        if kind is None:
            found.append(f"{value.get('apiVersion')} {value.get('kind')}: unknown")
            continue
        name = value["metadata"]["name"]
        if not LABEL.fullmatch(name):
            found.append(f"{name}: no name of an object")
        found += problems(value, kind, value["kind"])
    return found


def test_the_deployment_s_objects_are_kubernetes_own() -> None:
    assert checked((FOLDER / "kubernetes.yaml").read_text()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("periodSeconds: 2", "periodSecond: 2", "periodSecond: unknown"),
        ("periodSeconds: 2", 'periodSeconds: "2"', "is no int"),
        ("memory: 32Gi", "memory: 32GB", "'32GB' is no quantity"),
        ("apiVersion: apps/v1", "apiVersion: apps/v2", "apps/v2 Deployment: unknown"),
        ("  accessModes: [ReadWriteMany]", "  accessModes: ReadWriteMany", "no list"),
        (
            "            - {name: http, containerPort: 8000}",
            "            - {name: http}",
            "ports[0]: ",
        ),
        ("runAsNonRoot: true", "runAsNonRoot: 1", "is no bool"),
    ],
)
def test_the_check_sees(right: str, wrong: str, problem: str) -> None:
    text = (FOLDER / "kubernetes.yaml").read_text()
    assert right in text
    assert problem in "\n".join(checked(text.replace(right, wrong, 1)))


def test_the_ray_service_s_pods_are_kubernetes_own() -> None:
    [service] = read((FOLDER / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) <= RAY_SERVICE
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) <= RAY_CLUSTER
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= HEAD_GROUP
    for group in (head, *workers):
        assert list(problems(group["template"], "V1PodTemplateSpec", "template")) == []
        # Flags of `ray start`, which are text.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in workers:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
