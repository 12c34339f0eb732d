"""The clusters' files: what Ray accepts, and fields that Ray does not check."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rayfed_sub.runtime.cluster import available_first, grown_by

ROOT = Path(__file__).parents[2]
AWS = "cluster.yaml"
LAUNCHED = (AWS, "experiments/clusters/gcp.yaml", "experiments/clusters/on-premise.yaml")  # by `ray up`
KUBERAY = "experiments/clusters/kuberay.yaml"

# Keys that Ray's providers read (ray/autoscaler/_private/{aws,gcp,local}).
PROVIDER = {
    "aws": {
        *("type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "use_external_head_ip"),
        *("key_pair", "security_group", "aws_credentials", "cloudwatch", "disable_node_updaters"),
    },
    "gcp": {
        *("type", "region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"),
        "gcp_credentials",
    },
    "local": {"type", "head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}
# The keys of Compute Engine's `instances.insert`, by their place (https://cloud.google.com/compute/docs/reference/rest).
GCP = {
    "": {
        *("machineType", "disks", "networkInterfaces", "metadata", "scheduling", "guestAccelerators", "labels", "tags"),
        *("serviceAccounts", "minCpuPlatform", "canIpForward", "shieldedInstanceConfig", "reservationAffinity"),
        *("confidentialInstanceConfig", "advancedMachineFeatures", "sourceMachineImage", "resourcePolicies"),
    },
    "disks": {
        *("boot", "autoDelete", "type", "initializeParams", "source", "mode", "deviceName", "interface"),
        *("diskSizeGb", "diskEncryptionKey", "guestOsFeatures"),
    },
    "disks.initializeParams": {
        *("diskSizeGb", "sourceImage", "sourceSnapshot", "diskType", "diskName", "labels", "provisionedIops"),
    },
    "metadata": {"items"},
    "metadata.items": {"key", "value"},
    "scheduling": {
        *("provisioningModel", "instanceTerminationAction", "onHostMaintenance", "automaticRestart", "preemptible"),
        *("nodeAffinities", "maxRunDuration", "minNodeCpus", "locationHint"),
    },
    "guestAccelerators": {"acceleratorType", "acceleratorCount"},
}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key in config if key.endswith("_commands") for command in config[key]]


def faults(config: dict[str, Any]) -> list[str]:
    """Misspelt keys under `provider` and in every `node_config`, where Ray's schema accepts anything."""
    provider = config["provider"]["type"]
    found = [f"provider.{key}" for key in config["provider"] if key not in PROVIDER[provider]]
    for name, kind in config.get("available_node_types", {}).items():
        check = {"aws": aws_faults, "gcp": gcp_faults}[provider]
        found += [f"{name}: {fault}" for fault in check(kind["node_config"])]
    return found


def aws_faults(node_config: dict[str, Any]) -> list[str]:
    """Checked with the service model that botocore itself uses for the parameters of RunInstances, at every depth."""
    import botocore.session
    from botocore.validate import ParamValidator

    asked = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    counted = {**node_config, "MinCount": 1, "MaxCount": 1}  # Ray adds them
    return [line for line in ParamValidator().validate(counted, asked).generate_report().splitlines() if line]


def gcp_faults(node_config: Any, place: str = "") -> list[str]:
    if isinstance(node_config, list):
        return [fault for item in node_config for fault in gcp_faults(item, place)]
    if not isinstance(node_config, dict) or place not in GCP:
        return []
    inner = ((value, f"{place}.{key}".lstrip(".")) for key, value in node_config.items())
    return [f"{place}.{key}".lstrip(".") for key in node_config if key not in GCP[place]] + [
        fault for value, below in inner for fault in gcp_faults(value, below)
    ]


launched = pytest.mark.parametrize("name", LAUNCHED)


@launched
def test_ray_accepts_the_cluster(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)
    left_to_ray = {
        *("upscaling_speed", "cluster_synced_files", "file_mounts_sync_continuously", "rsync_exclude", "rsync_filter")
    }
    made_by_ray = {"available_node_types", "head_node_type"} if "local" in prepared["provider"].values() else set()
    assert set(prepared) - set(read(name)) <= left_to_ray | made_by_ray, "every setting that matters is in the file"


@launched
def test_no_key_is_misspelt(name: str) -> None:
    assert faults(read(name)) == []


@pytest.mark.parametrize(
    ("name", "place", "key", "value"),
    [
        (AWS, ("provider",), "availibility_zone", "us-west-2a"),
        (AWS, ("available_node_types", "head", "node_config"), "InstanceTyp", "m5.large"),
        (AWS, ("available_node_types", "gpu-spot", "node_config", "InstanceMarketOptions"), "Markettype", "spot"),
        (AWS, ("available_node_types", "head", "node_config", "BlockDeviceMappings", 0, "Ebs"), "Size", 40),
        (AWS, ("available_node_types", "head", "node_config", "BlockDeviceMappings", 0, "Ebs"), "VolumeSize", "40"),
        (LAUNCHED[1], ("provider",), "zone", "us-west1-a"),
        (LAUNCHED[1], ("available_node_types", "head", "node_config"), "machinetype", "n2-standard-2"),
        (LAUNCHED[1], ("available_node_types", "gpu-spot", "node_config", "scheduling"), "provisioning", "SPOT"),
        (LAUNCHED[1], ("available_node_types", "head", "node_config", "disks", 0, "initializeParams"), "size", 40),
        (LAUNCHED[2], ("provider",), "workers", []),
    ],
)
def test_planted_typo_is_found(name: str, place: tuple[str | int, ...], key: str, value: object) -> None:
    config = copy.deepcopy(read(name))
    spot: Any = config
    for step in place:
        spot = spot[step]
    spot[key] = value
    found = faults(config)  # one per node type that shares an anchor
    assert found != []
    assert [fault for fault in found if key not in fault] == []


@launched
def test_every_node_requires_the_token(name: str) -> None:
    """On every line that starts Ray; the token's file is readable by its owner alone; the dashboard stays on the
    head."""
    config = read(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        first, *_, start = config[key]
        assert first == "chmod 600 ~/.ray/auth_token"
        assert [line for line in config[key] if " start " in line] == [start]
        assert re.search(r"\bRAY_AUTH_MODE=token\b.*/ray start ", start), start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    home = f"/home/{config['auth']['ssh_user']}/"
    assert config["file_mounts"][home + ".ray/auth_token"] == "~/.ray/auth_token"
    assert all(target.startswith(home) for target in config["file_mounts"])


@pytest.mark.parametrize("name", [*LAUNCHED, KUBERAY])
def test_every_node_frees_objects_at_once(name: str) -> None:
    """as in a local run (runtime/local_ray.py), for any number of nodes: head and workers."""
    config = read(name)
    if name == KUBERAY:
        groups = [config["spec"]["headGroupSpec"], *config["spec"]["workerGroupSpecs"]]
        found = [group["template"]["spec"]["containers"][0]["env"] for group in groups]
        assert found == [[{"name": "RAY_free_objects_batch_size", "value": "1"}]] * 2
        return
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert re.search(r" RAY_free_objects_batch_size=1 .*/ray start ", config[key][-1])


@launched
def test_sent_files_exist(name: str) -> None:
    """They are enough for `pip install -e`: the paths that pyproject.toml names, and the versions."""
    sources = [source for source in read(name)["file_mounts"].values() if not source.startswith("~")]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert {"rayfed_sub", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(sources)


@pytest.mark.parametrize("name", [*LAUNCHED, KUBERAY])
def test_versions_match_the_constraints(name: str) -> None:
    text, pinned = (ROOT / name).read_text(encoding="utf-8"), pins()
    installed = re.findall(r"\b([a-z0-9-]+)(?:\[[a-z,]+\])?==([\w.]+)", text)
    assert {package for package, _ in installed} >= {"ray", "torch"}
    assert [(package, version) for package, version in installed if pinned.get(package, version) != version] == []
    assert "constraints.txt ray" in text or 'constraints.txt "ray' in text


def chosen(scorer: Any, **available: bool) -> dict[str, int]:
    """The nodes that Ray's first autoscaler starts for one waiting worker, given the outcome of the last launches."""
    from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for

    records = {kind.replace("_", "-"): SimpleNamespace(is_available=there) for kind, there in available.items()}
    scored = partial(scorer, node_availability_summary=SimpleNamespace(node_availabilities=records))
    added, waiting = get_nodes_for(read(AWS)["available_node_types"], {}, "head", 4, [{"CPU": 1, "GPU": 1}], scored)
    assert waiting == []
    return dict(added)


def test_spot_comes_first_and_refused_types_are_skipped() -> None:
    kinds = read(AWS)["available_node_types"]
    assert [kind for kind in kinds if "InstanceMarketOptions" in kinds[kind]["node_config"]] == ["gpu-spot"]
    assert kinds["gpu-spot"]["resources"] == kinds["gpu-on-demand"]["resources"]
    assert chosen(available_first) == {"gpu-spot": 1}
    assert chosen(available_first, gpu_spot=True, gpu_on_demand=True) == {"gpu-spot": 1}
    assert chosen(available_first, gpu_spot=False) == {"gpu-on-demand": 1}
    assert chosen(available_first, gpu_spot=False, gpu_on_demand=True) == {"gpu-on-demand": 1}
    assert chosen(available_first, gpu_spot=False, gpu_on_demand=False) == {"gpu-spot": 1}  # both again, in turn


def test_ray_alone_keeps_requesting_unavailable_nodes() -> None:
    """The reason for `available_first`.  If this test fails, Ray has the feature, and `launches.py` can go.

    The second autoscaler lowers the priority of a node type only if a launched node never came up; a launch that the
    cloud refuses is ALLOCATION_FAILED."""
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    assert chosen(_default_utilization_scorer, gpu_spot=False) == {"gpu-spot": 1}
    second = CloudResourceMonitor()
    second.notify([InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_FAILED, instance_type="gpu-spot")])
    assert (second.get_resource_availabilities(), second.get_recoverable_resource_availabilities()) == ({}, {})
    second.notify([InstanceUpdateEvent(new_instance_status=Instance.ALLOCATION_TIMEOUT, instance_type="gpu-spot")])
    assert second.get_recoverable_resource_availabilities() == {"gpu-spot": 0.0}


def test_head_starts_the_autoscaler_with_our_scorer() -> None:
    """The start line has the function's name as Ray loads it, in the autoscaler that reads it."""
    from ray.autoscaler._private.loader import load_function_or_class

    start = read(AWS)["head_start_ray_commands"][-1]
    name = re.search(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", start)
    assert name is not None
    assert load_function_or_class(name[1]) is available_first
    assert "RAY_enable_autoscaler_v2=0" in start


def test_run_reads_the_cluster_s_limits() -> None:
    """Four GPU nodes of 8 CPUs: the limit of both types together, not of each."""
    assert grown_by(read(AWS)) == [{"CPU": 8, "GPU": 1}] * 4


def test_cluster_on_kubernetes() -> None:
    manifest = read(KUBERAY)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert spec["rayVersion"] == pins()["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group, name in ((spec["headGroupSpec"], "ray-head"), (workers, "ray-worker")):
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"] == name
        assert container["image"].endswith(f":ray-{pins()['ray']}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
