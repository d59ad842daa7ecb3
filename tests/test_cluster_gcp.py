"""cluster/gcp.yaml as Ray would use it: its own bootstrap with a stand-in for Google's API, and the machines
that it would ask for against the fields that Compute Engine knows."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from tests.test_cluster import load

google = pytest.importorskip("googleapiclient", reason="pip install google-api-python-client")


@pytest.fixture(scope="module")
def schemas() -> dict:
    """The types of Compute Engine's API, as its client carries them."""
    documents = Path(google.__file__).parent / "discovery_cache" / "documents"
    return json.loads((documents / "compute.v1.json").read_text())["schemas"]


def problems(value, schema: dict, schemas: dict, where: str = "") -> list[str]:
    """What of a value the API would not understand."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type", "object")
    python = {"object": dict, "array": list, "boolean": bool, "integer": (int, str), "string": (str, int)}
    if not isinstance(value, python[kind]):
        return [f"{where}: {kind} expected, not {value!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    if kind == "array":
        parts = [(entry, schema["items"], f"{where}[{index}]") for index, entry in enumerate(value)]
    elif "properties" not in schema:
        parts = []
    else:
        unknown = [f"{where}.{name}: unknown" for name in value if name not in schema["properties"]]
        if unknown:
            return unknown
        parts = [(entry, schema["properties"][name], f"{where}.{name}") for name, entry in value.items()]
    return [problem for part in parts for problem in problems(*part[:2], schemas, part[2])]


@pytest.fixture
def cloud(monkeypatch, tmp_path):
    """(bootstrapped config, the calls that were made): Ray's bootstrap with a project that is there."""
    from ray.autoscaler._private.gcp import config as bootstrap
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))
    crm, iam, compute = mock.MagicMock(), mock.MagicMock(), mock.MagicMock()
    crm.projects().get().execute.return_value = {"lifecycleState": "ACTIVE", "projectId": "PROJECT"}
    crm.projects().getIamPolicy().execute.return_value = {"bindings": []}
    account = {"email": "made-by-ray", "projectId": "PROJECT"}
    iam.projects().serviceAccounts().get().execute.return_value = account
    clients = {"_create_crm": crm, "_create_iam": iam, "_create_compute": compute}
    for name, client in clients.items():
        monkeypatch.setattr(bootstrap, name, lambda *_, client=client: client)
    ready = bootstrap.bootstrap_gcp(prepare_config(load("gcp.yaml")))
    return ready, crm, compute


def test_rays_bootstrap_opens_no_network_and_lets_no_key_into_the_project(cloud):
    ready, crm, compute = cloud
    assert compute.mock_calls == [], "neither firewall, nor subnet, nor a key for the whole project"
    for kind in ready["available_node_types"].values():
        (interface,) = kind["node_config"]["networkInterfaces"]
        assert "accessConfigs" not in interface, "no public address"
        items = {item["key"]: item["value"] for item in kind["node_config"]["metadata"]["items"]}
        assert items["block-project-ssh-keys"] == "true"
    roles = {
        binding["role"]
        for binding in crm.projects().setIamPolicy.call_args.kwargs["body"]["policy"]["bindings"]
    }
    assert {"roles/compute.admin", "roles/storage.objectAdmin"} <= roles, "gcp.yaml says what Ray gives"


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_the_machines_are_asked_for_in_fields_that_the_api_knows(cloud, schemas, kind):
    from ray.autoscaler._private.gcp.node import GCPCompute

    ready, _, _ = cloud
    node_config = ready["available_node_types"][kind]["node_config"]
    resource = mock.MagicMock()
    compute = GCPCompute(resource, "PROJECT", "us-central1-a", "pmpd")
    with mock.patch.object(compute, "get_new_authorized_http"):
        labels = {"ray-node-name": "ray-pmpd-worker", "ray-node-type": "worker"}
        compute.create_instance(node_config, labels, wait_for_operation=False)
    asked = resource.instances().insert.call_args.kwargs["body"]
    assert problems(asked, {"$ref": "Instance"}, schemas) == []
    assert asked["machineType"].startswith("zones/us-central1-a/machineTypes/")
    if kind == "gpu":
        assert asked["scheduling"]["onHostMaintenance"] == "TERMINATE", "no GPU moves to another host"
        assert asked["guestAccelerators"][0]["acceleratorCount"] == 1
    wrong = {**asked, "scheduling": [{"preemptible": True}], "discs": []}
    assert len(problems(wrong, {"$ref": "Instance"}, schemas)) == 1
    assert "scheduling" in problems({**asked, "scheduling": [{}]}, {"$ref": "Instance"}, schemas)[0]
