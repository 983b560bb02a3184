"""The manifests for Kubernetes: they render, hold to its schemas, and their server starts and answers their probes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd_client import Tls
from tests.certificates import Authority, CertificateFiles
from tests.environments import ROOT
from tests.processes import wait_until
from tests.scrapes import scrape, trusting
from tests.servers import free_port, server_process

DEPLOY: Final = ROOT / "deploy"
PLACES: Final = [
    "base",
    "overlays/cpu",
    "overlays/node-socket",
    "overlays/autoscaling",
    "overlays/several-cards",
]
SERVING: Final = health_pb2.HealthCheckResponse.SERVING
FILES: Final = "/etc/deconvd/"

Manifest = dict[str, Any]


def run_tool(name: str, *words: object) -> str:
    """Run a program of this environment, and return what it printed."""
    command = [str(Path(sys.executable).parent / name), *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def render(place: str) -> str:
    return run_tool("kubectl", "kustomize", DEPLOY / "kubernetes" / place)


@pytest.fixture(params=PLACES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return list(yaml.safe_load_all(render(request.param)))


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> Manifest:
    (one,) = [manifest for manifest in manifests if manifest["kind"] in kinds]
    return one


def pod_of(manifests: Sequence[Manifest]) -> Manifest:
    pod: Manifest = of_kind(manifests, "Deployment", "DaemonSet")["spec"]["template"]
    return pod


def container_of(manifests: Sequence[Manifest]) -> Manifest:
    (container,) = pod_of(manifests)["spec"]["containers"]
    return dict(container)


def options_of(container: Mapping[str, Any]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for word in container["args"]:
        name, _, value = word.partition("=")
        options.setdefault(name, []).append(value)
    return options


@pytest.mark.parametrize("place", PLACES)
def test_the_manifests_hold_to_the_schemas(place: str, tmp_path: Path) -> None:
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(render(place))

    run_tool("kubernetes-validate", "--strict", rendered)


def test_the_files_are_clean_yaml() -> None:
    rules = "{extends: default, rules: {line-length: {max: 125}, document-start: disable, comments: disable}}"

    run_tool("yamllint", "--strict", "--config-data", rules, DEPLOY)


def test_every_container_may_do_little(manifests: list[Manifest]) -> None:
    spec = pod_of(manifests)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"]["drop"] == ["ALL"]
        assert container["resources"]["limits"]["memory"]
    assert "runAsUser" not in container_of(manifests)["securityContext"]


def test_ports_and_files_are_those_of_the_options(manifests: list[Manifest]) -> None:
    container, spec = container_of(manifests), pod_of(manifests)["spec"]
    options = options_of(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"0.0.0.0:{ports['grpc']}" in options["--listen"]
    for name in ("direct", "health", "metrics"):
        assert [str(ports[name])] == options[f"--{name}-port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]

    for manifest in manifests:
        for port in manifest["spec"]["ports"] if manifest["kind"] == "Service" else ():
            assert ports[port["targetPort"]] == port["port"]
    for rule in of_kind(manifests, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports.keys()

    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["volumes"]}
    for name, options_name in (("tls", "--tls-cert"), ("tls", "--tls-key"), ("tokens", "--tokens")):
        (path,) = options[options_name]
        assert str(Path(path).parent) == mounts[name]["mountPath"]
        assert "subPath" not in mounts[name]  # or a secret that changes would not be read again
    (store,) = options["--plan-store"]
    assert store.startswith(mounts["cache"]["mountPath"])


def test_each_process_of_a_server_with_several_has_its_ports() -> None:
    manifests = list(yaml.safe_load_all(render("overlays/several-cards")))
    container = container_of(manifests)
    options = options_of(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    cards_count = container["resources"]["limits"]["nvidia.com/gpu"]
    count = int(options["--processes"][0]) * cards_count

    (worker_port,), (direct_port,) = options["--worker-port"], options["--direct-port"]
    workers = [ports[f"worker-{number}"] for number in range(count)]
    assert workers == list(range(int(worker_port), int(worker_port) + count))
    directs = [ports["direct"], *(ports[f"direct-{number}"] for number in range(1, count))]
    assert directs == list(range(int(direct_port), int(direct_port) + count))
    assert len(set(ports.values())) == len(ports)
    allowed = of_kind(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"]
    assert {port["port"] for port in allowed} == ports.keys() - {"health", "metrics"}


def test_a_server_has_the_time_to_drain(manifests: list[Manifest]) -> None:
    options = options_of(container_of(manifests))
    (delay_s,), (timeout_s,) = options["--drain-delay-s"], options["--drain-timeout-s"]

    allowed_s = pod_of(manifests)["spec"]["terminationGracePeriodSeconds"]

    assert allowed_s >= float(delay_s) + float(timeout_s) + 2


def test_what_selects_pods_selects_these(manifests: list[Manifest]) -> None:
    labels = pod_of(manifests)["metadata"]["labels"].items()
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Service":
                assert spec["selector"].items() <= labels
            case "NetworkPolicy":
                assert spec["podSelector"]["matchLabels"].items() <= labels
            case "PodDisruptionBudget" | "Deployment" | "DaemonSet":
                assert spec["selector"]["matchLabels"].items() <= labels
            case "HorizontalPodAutoscaler":
                scaled = of_kind(manifests, "Deployment")
                assert "replicas" not in scaled["spec"]  # else each `apply` would undo the scaling
                assert spec["scaleTargetRef"]["name"] == scaled["metadata"]["name"]


def local_options(container: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield the options of a container's server, with files of a folder and with free ports."""
    for name, values in options_of(container).items():
        for value in values:
            if name == "--listen":
                continue
            if name.endswith("-port"):
                yield f"{name}={free_port()}"
            elif value.startswith("/var/cache/"):
                yield f"{name}={folder / 'plans'}"
            else:
                yield f"{name}={value.replace(FILES, f'{folder}/')}"


def new_token(name: str, tokens: Path) -> str:
    """Return a new token of the server, whose hash is in a file from then on."""
    command = ["-m", "deconvd_server", "token", "new", name, "--tokens", str(tokens)]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def test_a_server_with_these_options_answers_the_probes_prometheus_and_those_who_have_a_token(
    tmp_path: Path, loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    container = container_of(list(yaml.safe_load_all(render("base"))))
    (tmp_path / "tls").mkdir()
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tls/tls.crt").write_bytes(loopback_certificate.cert.read_bytes())
    (tmp_path / "tls/tls.key").write_bytes(loopback_certificate.key.read_bytes())
    tokens = tmp_path / "tokens/tokens.txt"
    alice, prometheus = (new_token(name, tokens) for name in ("alice", "prometheus"))
    options = list(local_options(container, tmp_path))
    ports = {name: port for name, _, port in (word.partition("=") for word in options)}

    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        with grpc.insecure_channel(f"127.0.0.1:{ports['--health-port']}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                request = health_pb2.HealthCheckRequest(service=container[probe]["grpc"]["service"])
                assert stub.Check(request, timeout=30).status == SERVING
        with deconvd_client.connect(server.target, tls=Tls(authority.ca), token=alice) as F:
            assert F.server_info().version
        address = f"127.0.0.1:{ports['--metrics-port']}"
        tls = trusting(authority.ca)
        wait_until(
            lambda: (
                "alice"
                in scrape(address, token=prometheus, tls=tls).label_values(
                    "deconvd_calls_total", "tenant"
                )
            )
        )
        with (
            deconvd_client.connect(server.target, tls=Tls(authority.ca)) as stranger,
            pytest.raises(deconvd_client.UnauthenticatedError),
        ):
            stranger.server_info()
