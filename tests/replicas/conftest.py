"""A cluster of Ray's on this machine, and tiny models to serve on it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The helpers of the server's tests are modules of their own.
sys.path.insert(0, str(ROOT / "tests" / "server"))


@pytest.fixture(scope="session")
def model_flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags of a model with random weights, on one thread of the CPU."""
    from harness import TINY_MODEL

    folder = tmp_path_factory.mktemp("model")
    config = {**TINY_MODEL, "max_position_embeddings": 1 << 14}
    (folder / "config.json").write_text(json.dumps(config))
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return {
        "model": str(folder),
        "served_model_name": ("tiny",),
        "load_format": "dummy",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "chat_template": str(template),
    }


def start_ray(environment: dict[str, str]) -> None:
    """Start Ray. It gives its own processes 30 s, which no setting changes: on a machine that others
    use too it is asked again."""
    import ray

    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                # By Ray's counting, which starts as many processes at once.
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=100 << 20,
                runtime_env={"env_vars": environment},
            )
            return
        except Exception as error:
            ray.shutdown()
            if "timed out during startup" not in str(error) or not attempts_left:
                raise


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Ray with Serve; the URL that it listens on."""
    ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'octavo[ray]')")
    serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = (ROOT / "python", Path(__file__).parent / "stand_in")
    environment = {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        # Replicas are seen to come and go within a test.
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
        # A proxy that is not ready in three times five seconds is killed: too soon for a machine
        # that others use too.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    os.environ.update(environment, RAY_USAGE_STATS_ENABLED="0")
    # At the end: an engine of Ray's own comes first.
    sys.path.append(str(Path(__file__).parent / "stand_in"))
    start_ray(environment)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
