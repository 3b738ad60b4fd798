"""Every template in `cluster/`: valid by its schema, and safe by rules that no schema knows."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from mcrise_ray.jobfiles import parse_job
from mcrise_ray.jobspec import ActorRange

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCHEMA = yaml.safe_load((Path(__file__).parent / "data" / "kubernetes.yaml").read_text())
TOKEN_SINCE = Version("2.52.0")
METRICS_PORT, DASHBOARD_PORT = 8080, 8265


def stem(path: Path) -> str:
    return path.stem


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def objects(kind: str) -> list[dict[str, Any]]:
    return [found for path in MANIFESTS for found in documents(path) if found["kind"] == kind]


def ray_clusters() -> dict[str, dict[str, Any]]:
    specs = {found["metadata"]["name"]: found["spec"] for found in objects("RayCluster")}
    specs |= {found["metadata"]["name"]: found["spec"]["rayClusterSpec"] for found in objects("RayJob")}
    assert set(specs) == {"mcrise", "mcrise-job"}
    return specs


CLUSTERS = list(ray_clusters().values())


# Ray's cluster launcher.


@pytest.fixture(params=LAUNCHER, ids=stem)
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_there_is_a_launcher_file_for_each_place() -> None:
    assert [path.stem for path in LAUNCHER] == ["aws", "gcp", "onprem"]


def test_launcher_files_pass_rays_own_validation(launcher: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(launcher))
    validate_config(prepared)
    for node in prepared["available_node_types"].values():
        assert node["max_workers"] >= node["min_workers"] == 0


def test_rays_validation_is_closed(launcher: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config({**launcher, "idle_timeout_minute": 3}))


def test_launched_nodes_ask_for_a_token(launcher: dict[str, Any]) -> None:
    commands = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert command.startswith(". ~/node-env.sh;"), "authentication must be on before Ray starts"
    mounts = {Path(remote).name: local for remote, local in launcher["file_mounts"].items()}
    assert mounts["auth_token"] == "~/.ray/auth_token"
    assert (ROOT / mounts["node-env.sh"]).is_file()


def test_launched_heads_keep_the_dashboard_to_themselves_and_do_no_work(launcher: dict[str, Any]) -> None:
    (start,) = [command for command in launcher["head_start_ray_commands"] if "ray start" in command]
    assert "--head" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert "--ray-client-server-port" not in start
    assert f"--metrics-export-port={METRICS_PORT}" in start


def test_launched_clusters_open_no_port_and_hold_no_secret(launcher: dict[str, Any]) -> None:
    assert "IpPermissions" not in launcher["provider"].get("security_group", {})
    text = json.dumps(launcher)
    assert not re.search(r"RAY_AUTH_TOKEN=|AKIA|-----BEGIN|password", text)
    assert "0.0.0.0" not in text


@pytest.mark.parametrize("place", ["aws", "gcp"])
def test_launched_workers_are_spot_and_start_from_zero(place: str) -> None:
    config = yaml.safe_load((CLUSTER / "launcher" / f"{place}.yaml").read_text())
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    workers = {name: node for name, node in config["available_node_types"].items() if node is not head}
    assert sum(node["resources"].get("GPU", 0) > 0 for node in workers.values()) == 1
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]
    for node in workers.values():
        assert node["min_workers"] == 0
        assert node["max_workers"] > 0
        if place == "aws":
            assert node["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        else:
            assert node["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def test_aws_instances_give_their_credentials_to_nobody_else() -> None:
    config = yaml.safe_load((CLUSTER / "launcher" / "aws.yaml").read_text())
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("path", LAUNCHER, ids=stem)
def test_tls_of_launched_clusters_is_a_matter_of_uncommenting(path: Path) -> None:
    text = path.read_text()
    switched = re.sub(r"^( *)# (\S+ca\.(?:crt|key): )", r"\1\2", text, flags=re.MULTILINE)
    mounts = yaml.safe_load(switched)["file_mounts"]
    assert len(mounts) == len(yaml.safe_load(text)["file_mounts"]) + 2
    validate_config(prepare_config(yaml.safe_load(switched)))


# What a node does before it starts Ray.


def sourced(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f". {CLUSTER}/launcher/node-env.sh; env | grep ^RAY_"
    return subprocess.run(
        ["bash", "-c", script],
        env={"HOME": str(home), "PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)
    return tmp_path


def test_a_node_turns_authentication_on_and_narrows_the_token(home: Path) -> None:
    (home / ".ray" / "auth_token").chmod(0o644)
    done = sourced(home)
    assert done.returncode == 0, done.stderr
    assert {"RAY_AUTH_MODE=token", "RAY_USE_TLS=0"} <= set(done.stdout.split())
    assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert "tttt" not in done.stdout


def test_a_node_without_a_token_does_not_start(tmp_path: Path) -> None:
    done = sourced(tmp_path)
    assert done.returncode == 1
    assert "run 'mcrise token'" in done.stderr
    assert done.stdout == ""


def test_a_node_makes_itself_a_certificate(home: Path) -> None:
    tls = home / "mcrise-tls"
    subprocess.run([CLUSTER / "launcher" / "make-ca.sh", tls], check=True, capture_output=True)
    assert (tls / "ca.key").stat().st_mode & 0o777 == 0o600
    done = sourced(home, RAY_USE_TLS="1")
    assert done.returncode == 0, done.stderr
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", tls / "ca.crt", "-verify_ip", "127.0.0.1", tls / "node.crt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    assert (tls / "node.key").stat().st_mode & 0o777 == 0o600
    again = subprocess.run([CLUSTER / "launcher" / "make-ca.sh", tls], capture_output=True, check=False)
    assert again.returncode == 1


def test_a_node_without_an_authority_does_not_start(home: Path) -> None:
    (home / "mcrise-tls").mkdir()
    assert sourced(home, RAY_USE_TLS="1").returncode == 1


# KubeRay.


@pytest.mark.parametrize("path", MANIFESTS, ids=stem)
def test_manifests_pass_the_closed_schema(path: Path) -> None:
    found = documents(path)
    assert found
    for manifest in found:
        jsonschema.validate(manifest, SCHEMA["$defs"][manifest["kind"]] | {"$defs": SCHEMA["$defs"]})


def closed(schema: Any) -> bool:
    """Whether every object that names its properties allows no others."""
    if isinstance(schema, list):
        return all(closed(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    names = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return (not names or schema.get("additionalProperties") is False) and all(map(closed, schema.values()))


def test_the_schema_is_closed_everywhere() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert closed(SCHEMA)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (("spec",), "enableInTreeAutoScaling"),
        (("spec", "headGroupSpec"), "restartPolicy"),
        (("spec", "workerGroupSpecs", 0), "minReplica"),
        (("spec", "workerGroupSpecs", 0, "template", "spec"), "tolerate"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0), "volumes"),
    ],
)
def test_the_schema_refuses_what_is_misspelt_or_misplaced(where: tuple[str | int, ...], name: str) -> None:
    (manifest,) = copy.deepcopy(objects("RayCluster"))
    inside: Any = manifest
    for step in where:
        inside = inside[step]
    inside[name] = "x"
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(manifest, SCHEMA["$defs"]["RayCluster"] | {"$defs": SCHEMA["$defs"]})


@pytest.mark.parametrize("spec", CLUSTERS, ids=ray_clusters())
def test_pods_ask_for_a_token(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert Version(spec["rayVersion"]) >= TOKEN_SINCE


@pytest.mark.parametrize("spec", CLUSTERS, ids=ray_clusters())
def test_heads_are_not_exposed_and_do_no_work(spec: dict[str, Any]) -> None:
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {6379, DASHBOARD_PORT, METRICS_PORT}, "no port of the Ray client (10001)"


@pytest.mark.parametrize("spec", CLUSTERS, ids=ray_clusters())
def test_worker_groups_start_from_zero_on_spot_nodes(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"] is True
    groups = spec["workerGroupSpecs"]
    with_gpu = 0
    for group in groups:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        pod = group["template"]["spec"]
        assert any("spot" in key for key in pod["nodeSelector"])
        assert any("spot" in toleration["key"] for toleration in pod["tolerations"])
        assert pod["restartPolicy"] == "Never", "the autoscaler's version 2 replaces pods itself"
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits == pod["containers"][0]["resources"]["requests"]
        on_gpu = "nvidia.com/gpu" in limits
        assert on_gpu == any(toleration["key"] == "nvidia.com/gpu" for toleration in pod["tolerations"])
        with_gpu += on_gpu
    assert with_gpu == 1


@pytest.mark.parametrize("spec", CLUSTERS, ids=ray_clusters())
def test_every_pod_is_narrow_and_sees_the_store(spec: dict[str, Any]) -> None:
    (claim,) = objects("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    templates = [
        spec["headGroupSpec"]["template"],
        *(group["template"] for group in spec["workerGroupSpecs"]),
    ]
    for template in templates:
        assert template["metadata"]["labels"] == {"app": "mcrise"}
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        claims = volumes["store"]["persistentVolumeClaim"]["claimName"]
        assert claims == claim["metadata"]["name"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["store"] == "/mnt/mcrise"
            assert mounts.keys() <= volumes.keys()
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_network_policy_covers_every_pod_and_opens_little() -> None:
    (policy,) = objects("NetworkPolicy")
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"] == {"app": "mcrise"}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    opened = {}
    for rule in spec["ingress"]:
        (peer,) = rule["from"]
        if peer == {"podSelector": {"matchLabels": {"app": "mcrise"}}}:
            assert "ports" not in rule
        else:
            (port,) = rule["ports"]
            opened[port["port"]] = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert opened == {DASHBOARD_PORT: "kuberay-operator", METRICS_PORT: "monitoring"}
    outside = [rule["ports"] for rule in spec["egress"] if "to" not in rule]
    assert [[port["port"] for port in ports] for ports in outside] == [[443, 6443]]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_tls_of_pods_is_a_matter_of_uncommenting(name: str) -> None:
    text = (CLUSTER / "kuberay" / f"{name}.yaml").read_text()
    switched = re.sub(r"^( *)# (tlsOptions:|  enabled: true)$", r"\1\2", text, flags=re.MULTILINE)
    manifest = list(yaml.safe_load_all(switched))[-1]
    jsonschema.validate(manifest, SCHEMA["$defs"][manifest["kind"]] | {"$defs": SCHEMA["$defs"]})
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["tlsOptions"] == {"enabled": True}


def test_one_off_jobs_end_resume_and_find_their_file() -> None:
    (job,) = objects("RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0 < spec["backoffLimit"]
    (config,) = objects("ConfigMap")
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volume = next(volume for volume in pod["volumes"] if "configMap" in volume)
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
    assert mount["readOnly"] is True
    script, file = spec["entrypoint"].split()[1:]
    assert Path(file).parent == Path(mount["mountPath"])
    assert (ROOT / Path(script).relative_to("/opt/mcrise")).is_file()
    job = parse_job(yaml.safe_load(config["data"][Path(file).name]))
    assert job.actors == ActorRange(min=1, max=8), "actors that wait are what makes it grow from zero"
    assert job.gpus_per_actor == 1, "there is none to be seen when the job begins"


# What all of them share.


def test_one_version_of_ray_everywhere() -> None:
    (argument,) = re.findall(r"ARG RAY_VERSION=(\S+)", (CLUSTER / "Dockerfile").read_text())
    versions = {spec["rayVersion"] for spec in CLUSTERS} | {argument}
    versions |= set(re.findall(r"ray\[default\]==([\d.]+)", (CLUSTER / "launcher/onprem.yaml").read_text()))
    assert versions == {argument}
    assert Version(argument) >= TOKEN_SINCE


def test_the_image_copies_what_exists_and_authenticates() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]
    assert {"mcrise_ray", "jobs", "pyproject.toml"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert any(line.startswith("ENV") and "RAY_AUTH_MODE=token" in line for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    allowed = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert all(f"!{name}" in allowed for name in copied)


def test_the_dashboard_shows_the_metrics_that_there_are() -> None:
    board = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"ray_mcrise_\w+", target["expr"])
    }
    assert shown == {
        "ray_mcrise_masks_total",
        "ray_mcrise_images_total",
        "ray_mcrise_retries_total",
        "ray_mcrise_actors",
        "ray_mcrise_relative_error",
    }
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS], ids=stem)
def test_what_is_to_edit_says_so(path: Path) -> None:
    """A placeholder has the word on its line or on one of the two lines above; comments have no others."""
    lines = path.read_text().splitlines()
    for place, line in enumerate(lines):
        if re.search(r"REGISTRY|PROJECT\b", line.partition("#")[0]):
            assert any("EDIT" in near for near in lines[max(0, place - 2) : place + 1]), line
    assert any("EDIT" in line for line in lines)


def test_the_readme_names_every_file_and_what_was_not_tried() -> None:
    readme = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.suffix != ".dockerignore" and path.name != "README.md":
            assert path.name in readme, path
    untried = readme.partition("## What could not be tried here")[2]
    assert all(word in untried for word in ("AWS", "Google Cloud", "KubeRay", "GPU", "Dockerfile"))
