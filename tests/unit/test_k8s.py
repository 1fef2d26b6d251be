"""The manifests build, fit the Kubernetes schemas, and agree with the services' own ports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tools import ROOT, require_tool

BASE = ROOT / "k8s" / "base"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kubectl = require_tool("kubectl")
    result = subprocess.run(
        [kubectl, "kustomize", str(BASE)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    built = tmp_path_factory.mktemp("k8s") / "base.yaml"
    built.write_text(result.stdout)
    return built


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_base_fits_the_kubernetes_schemas(manifests: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", "1.34", str(manifests)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_workload_runs_its_own_module_on_the_port_its_service_names(manifests: Path) -> None:
    found = documents(manifests)
    services = {d["metadata"]["name"]: d for d in found if d["kind"] == "Service"}
    modules = {}
    for workload in (d for d in found if d["kind"] == "Deployment"):
        name = workload["metadata"]["name"]
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        modules[name] = container["args"][1]
        port = services[name]["spec"]["ports"][0]["port"]
        assert container["ports"][0]["containerPort"] == port
        listen = {e["name"]: e["value"] for e in container["env"]}[f"SKIM_{name.upper()}_LISTEN"]
        assert listen.endswith(f":{port}")
        assert container["readinessProbe"]["grpc"] == {"port": port, "service": "readiness"}
    assert modules == {"gateway": "gateway", "drafter": "drafter_svc", "target": "target_svc"}


def test_every_container_is_locked_down(manifests: Path) -> None:
    for workload in (d for d in documents(manifests) if d["kind"] == "Deployment"):
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_settings_in_the_manifests_are_known_to_the_services(manifests: Path) -> None:
    from drafter_svc.config import DrafterSettings
    from gateway.config import GatewaySettings
    from target_svc.config import TargetSettings

    classes = {"gateway": GatewaySettings, "drafter": DrafterSettings, "target": TargetSettings}
    for workload in (d for d in documents(manifests) if d["kind"] == "Deployment"):
        settings = classes[workload["metadata"]["name"]]
        prefix = str(settings.model_config["env_prefix"])
        names = {f"{prefix}{field.upper()}" for field in settings.model_fields}
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        for entry in container["env"]:
            assert entry["name"] in names
