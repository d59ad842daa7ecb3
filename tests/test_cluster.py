"""cluster/gpu.yaml, checked as far as it can be without an account: by Ray's own validation, and for what
must not be in it."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"
TEXT = (CLUSTER / "gpu.yaml").read_text()


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load(TEXT)


def test_ray_accepts_the_cluster_file(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    broken = {**config, "head_node_type": "none"}
    with pytest.raises(ValueError, match="must be one of"):
        validate_config(prepare_config(broken))


def test_workers_have_one_gpu_and_none_is_kept_idle(config):
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["head"]["max_workers"] == 0
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["min_workers"] == 0
    assert kinds["gpu"]["max_workers"] == config["max_workers"] > 0


def test_nothing_is_open_to_the_world(config):
    for permission in config["provider"]["security_group"]["IpPermissions"]:
        for allowed in permission["IpRanges"]:
            assert ipaddress.ip_network(allowed["CidrIp"]).is_private
    assert config["provider"]["use_internal_ips"] is True
    assert "--dashboard-host=127.0.0.1" in TEXT
    assert not re.search(r"(?<!\d)0\.0\.0\.0", re.sub(r"#.*", "", TEXT))


def test_every_node_asks_for_the_token(config):
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    starts = [
        line
        for name in ("head", "worker")
        for line in config[f"{name}_start_ray_commands"]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "disabled" not in re.sub(r"#.*", "", TEXT)


def test_all_nodes_install_one_pinned_project(config):
    install = [line for line in config["setup_commands"] if "pip install" in line]
    assert len(install) == 1
    assert "@COMMIT" in install[0]


def test_every_line_a_user_must_change_is_marked():
    placeholders = re.compile(
        r"0{8,}|OWNER|us-west-2|InstanceType: g|ray-head|ray-worker|CidrIp|max_workers: [1-9]"
    )
    unmarked = [line for line in TEXT.splitlines() if placeholders.search(line) and "CHANGE" not in line]
    assert unmarked == []


def test_the_readme_leads_from_nothing_to_the_parquet():
    text = (CLUSTER / "README.md").read_text()
    steps = ["ray get-auth-token --generate", "ray up", "ray dashboard", "export RAY_AUTH_MODE=token",
    "ray job submit", "--working-dir .",
             "pmpd label", "pmpd inspect", "read_parquet", "ray down"]  # fmt: skip
    places = [text.find(step, text.find("## 1.")) for step in steps]
    assert -1 not in places, dict(zip(steps, places, strict=True))
    assert places == sorted(places), "the steps come in the order in which they are done"
