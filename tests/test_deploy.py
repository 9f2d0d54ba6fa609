"""deploy/: its files are well-formed, and every flag, path and limit in them is octavo's."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.cli.main import make_parser
from octavo.config import EngineConfig
from octavo.flags import flags_of, resolve
from octavo.server.http.config import ServerConfig
from octavo.server.routes import ROUTES

FOLDER = Path(__file__).parents[1] / "deploy"
CONFIGS = (EngineConfig, ServerConfig)
VARIABLES = {flag.env for config in CONFIGS for flag in flags_of(config)}
PATHS = {entry.path for entry in ROUTES}
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
UNIT = (FOLDER / "octavo.service").read_text()


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """The manifest's objects, by kind."""
    found = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    return {one["kind"]: one for one in found}


def seconds(name: str) -> float:
    [found] = re.findall(rf"^{name}=(\d+)$", UNIT, re.MULTILINE)
    return float(found)


def test_every_variable_is_a_flag() -> None:
    for path in FOLDER.iterdir():
        # Its placeholder aside.
        named = set(re.findall(r"OCTAVO_[A-Z_]*[A-Z]", path.read_text()))
        assert named <= VARIABLES, path


def test_the_environment_file_is_valid() -> None:
    lines = (FOLDER / "octavo.env").read_text().splitlines()
    environment = dict(
        line.lstrip("# ").split("=", 1) for line in lines if "=" in line and "<" not in line
    )
    engine, server = resolve({}, CONFIGS, environ=environment)
    assert engine.model == "/srv/models/Qwen3-8B"
    assert (server.host, server.log_format) == ("0.0.0.0", "json")


def test_the_unit_gives_answers_time_to_end() -> None:
    assert seconds("TimeoutStopSec") > ServerConfig().shutdown_timeout
    assert "ExecReload=/bin/kill -HUP $MAINPID" in UNIT
    assert seconds("LimitNOFILE") >= 4096


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "octavo.service"
    unit.write_text(UNIT.replace("/opt/octavo/bin/octavo", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "octavo.service" not in done.stderr


def test_the_deployment_probes_and_drains(objects: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["httpGet"]["path"] for kind, probe in probes.items()} == {
        "startup": "/health",
        "readiness": "/ready",
        "liveness": "/health",
    }
    assert {probe["httpGet"]["path"] for probe in probes.values()} <= PATHS
    environment = {one["name"]: one["value"] for one in container["env"]}
    own = {name: value for name, value in environment.items() if name.startswith("OCTAVO_")}
    _, server = resolve({}, CONFIGS, environ=own)
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > server.shutdown_timeout + pause
    assert server.metrics_need_key is False
    [port] = container["ports"]
    assert port["containerPort"] == ServerConfig().port
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_ray_service_is_an_application_of_ours() -> None:
    [service] = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "octavo.ray:build_app"
    flags = {k: v for k, v in application["args"].items() if k not in ("replica", "ingress")}
    engine, _ = resolve(flags, CONFIGS, environ={})
    [workers] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == (
        engine.tensor_parallel_size * engine.pipeline_parallel_size
    )
    scaling = application["args"]["replica"]["autoscaling_config"]
    assert scaling["max_replicas"] <= workers["maxReplicas"]
    assert scaling["min_replicas"] >= workers["minReplicas"]


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
def test_ray_takes_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    from octavo.ray import builder

    [service] = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text())
    text = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(text).applications
    args = application.args | {"api_key_file": None}
    built = builder.build_app({name: value for name, value in args.items() if value is not None})
    assert built._bound_deployment.name == "octavo-ingress"
    drain = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    assert drain["terminationGracePeriodSeconds"] > builder.DRAIN_S


def test_labels_and_claims_agree(objects: dict[str, Any]) -> None:
    deployment = objects["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == objects["Service"]["spec"]["selector"]
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in deployment["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [objects["PersistentVolumeClaim"]["metadata"]["name"]]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's: each name with its arguments."""
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_image_s_steps_are_well_formed() -> None:
    stages: list[str] = []
    arguments: set[str] = set()
    for name, rest in instructions():
        if name == "FROM":
            image, *stage = re.fullmatch(r"(\S+:\S+)(?: AS (\w+))?", rest).groups()  # type: ignore[union-attr]
            assert "latest" not in image
            stages += stage
        elif name == "ARG":
            arguments.add(rest.partition("=")[0])
        elif name == "COPY" and (source := re.match(r"--from=(\w+)", rest)):
            assert source[1] in stages
        elif name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0, rest
            assert set(re.findall(r"\$(\w+)", rest)) <= arguments
        else:
            assert name in ("COPY", "USER", "EXPOSE", "ENTRYPOINT"), name


def test_the_image_starts_the_server() -> None:
    found = dict(instructions())
    command = json.loads(found["ENTRYPOINT"])
    assert command[0] == "octavo"
    # As the head of the file starts it.
    words = [*command[1:], "/models/Qwen3-8B", "--api-key", "KEY"]
    arguments = vars(make_parser(words).parse_args(words))
    assert (arguments["host"], arguments["model_argument"]) == ("0.0.0.0", "/models/Qwen3-8B")
    assert found["EXPOSE"] == str(ServerConfig().port)
    # Of the manifest's security context.
    assert "--uid 1000" in DOCKERFILE
    assert "runAsUser: 1000" in (FOLDER / "kubernetes.yaml").read_text()


def test_the_image_is_built_from_all_that_the_wheel_is_made_of() -> None:
    kept = {
        line.removeprefix("!")
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    root = FOLDER.parent
    assert kept >= {"Cargo.toml", "Cargo.lock", "pyproject.toml", "rust_core", "python", "kernels"}
    assert all((root / name).exists() for name in kept)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["readme"] in kept
    [extras] = re.findall(r"^ARG EXTRAS=(\w+)$", DOCKERFILE, re.MULTILINE)
    [of_ray] = re.findall(r"EXTRAS=([\w,]+) -t octavo-ray", DOCKERFILE)
    assert {extras, *of_ray.split(",")} <= set(project["optional-dependencies"])
