"""The files in cluster/, checked as far as it can be without an account: by Ray's validation and bootstrap,
by stand-ins, and by what must not be in them."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ray_sessions import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHER_FILES = ["gpu.yaml", "gcp.yaml", "onprem.yaml"]


def load(name: str) -> dict:
    return yaml.safe_load((CLUSTER / name).read_text())


def commands_of(name: str) -> str:
    """The file without its comments."""
    return re.sub(r"(^|\s)#.*", "", (CLUSTER / name).read_text())


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_cluster_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    broken = {**config, "provider": {**config["provider"], "type": "none"}, "unknown_key": 1}
    with pytest.raises(Exception, match=r"none|unknown_key"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("name", ["gpu.yaml", "gcp.yaml"])
def test_workers_have_one_gpu_and_none_is_kept_idle(name):
    config = load(name)
    kinds = config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["head"]["max_workers"] == 0
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["min_workers"] == 0
    assert kinds["gpu"]["max_workers"] == config["max_workers"] > 0


@pytest.fixture
def amazon(monkeypatch, tmp_path):
    """moto's EC2 with a network, a security group of the user's own, and a home for Ray's key pair."""
    moto = pytest.importorskip("moto")
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        ec2 = boto3.client("ec2", "us-west-2")
        network = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        for role in ("ray-head", "ray-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=role)
        ids = {
            "SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
            "ImageId": ec2.describe_images()["Images"][0]["ImageId"],
            "SecurityGroupIds": [
                ec2.create_security_group(GroupName="own", Description="own", VpcId=network)["GroupId"]
            ],
        }
        yield ec2, ids


def open_to_the_world(ec2) -> list[str]:
    return [
        f"{group['GroupName']}: {permission.get('FromPort')}"
        for group in ec2.describe_security_groups()["SecurityGroups"]
        for permission in group["IpPermissions"]
        for allowed in [*permission["IpRanges"], *permission["Ipv6Ranges"]]
        if allowed.get("CidrIp") == "0.0.0.0/0" or allowed.get("CidrIpv6") == "::/0"
    ]


@pytest.mark.parametrize("own_group", [True, False])
def test_rays_bootstrap_opens_nothing_to_the_world(amazon, own_group):
    """Without a group by id Ray makes one and opens SSH to everybody, whatever the file says: the contrast
    shows that this test sees it."""
    from ray.autoscaler._private.aws import config as bootstrap
    from ray.autoscaler._private.util import prepare_config

    ec2, ids = amazon
    config = load("gpu.yaml")
    for kind in config["available_node_types"].values():
        assert set(ids) <= set(kind["node_config"]), "each of them is in the file, to be changed"
        kind["node_config"] |= ids
        if not own_group:
            del kind["node_config"]["SecurityGroupIds"]
    for cache in ("_set_config_info", "_get_subnets_or_die"):
        clear = getattr(getattr(bootstrap, cache, None), "cache_clear", None)
        if clear:
            clear()
    ready = bootstrap.bootstrap_aws(prepare_config(config))
    groups = {
        tuple(kind["node_config"]["SecurityGroupIds"]) for kind in ready["available_node_types"].values()
    }
    if own_group:
        assert groups == {tuple(ids["SecurityGroupIds"])}
        assert open_to_the_world(ec2) == []
    else:
        assert open_to_the_world(ec2), "Ray no longer opens SSH: the group by id may be optional now"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_node_asks_for_the_token_and_the_dashboard_is_local(name):
    config = load(name)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    starts = [
        line
        for kind in ("head", "worker")
        for line in config[f"{kind}_start_ray_commands"]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "disabled" not in commands_of(name)
    assert not re.search(r"(?<!\d)0\.0\.0\.0", commands_of(name))


@pytest.mark.parametrize("name", [*LAUNCHER_FILES, "kuberay.yaml"])
def test_every_line_a_user_must_change_is_marked(name):
    placeholders = re.compile(
        r"0{8,}|PROJECT|REGISTRY|us-west-2|us-central1|InstanceType: g|machineType: a|ray-head[,\n]|CidrIp|"
        r"max_workers: [1-9]|maxReplicas|claimName|10\.0\.0\."
    )
    lines = [line for line in (CLUSTER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    assert [line for line in lines if placeholders.search(line) and "CHANGE" not in line] == []


def test_the_image_has_what_triton_compiles_with_and_all_files_use_it():
    text = (CLUSTER / "Dockerfile").read_text()
    for needed in ("python3-dev", "g++", "rsync", "pmpd[all]", "nfs-common"):
        assert needed in text
    for name in LAUNCHER_FILES:
        assert load(name)["docker"]["image"] == "REGISTRY/pmpd:0.1.0"
        assert "--gpus all" in json.dumps(load(name)["docker"])


def pods(job: dict) -> list[dict]:
    cluster = job["spec"]["rayClusterSpec"]
    return [
        job["spec"]["submitterPodTemplate"]["spec"],
        cluster["headGroupSpec"]["template"]["spec"],
        *(group["template"]["spec"] for group in cluster["workerGroupSpecs"]),
    ]


KUBERAY = {
    "spec": {
        "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata",
        "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint",
        "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources", "entrypointNumCpus",
        "entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "suspend",
    },
    "cluster": {
        "headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions",
        "headServiceAnnotations", "suspend",
    },
    "autoscaler": {
        "resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext",
        "idleTimeoutSeconds", "upscalingMode",
    },
    "head": {"serviceType", "headService", "enableIngress", "rayStartParams", "template"},
    "workers": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template",
        "scaleStrategy",
    },
}  # fmt: skip
"""Fields of KubeRay's own types (ray-operator/apis/ray/v1): its API server drops any other without a word."""


def test_the_ray_job_of_kubernetes_has_only_fields_that_kuberay_knows():
    spec = load("kuberay.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    parts = {"spec": spec, "cluster": cluster, "autoscaler": cluster["autoscalerOptions"],
             "head": cluster["headGroupSpec"], "workers": workers}  # fmt: skip
    for name, part in parts.items():
        assert set(part) <= KUBERAY[name], name
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "strings, all"
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    pod = {"containers", "volumes", "restartPolicy", "tolerations", "nodeSelector", "serviceAccountName"}
    container = {"name", "image", "env", "resources", "volumeMounts", "command", "args", "ports"}
    for found in pods(load("kuberay.yaml")):
        assert set(found) <= pod
        assert all(set(one) <= container for one in found["containers"])


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def test_the_dockerfile_reads_as_docker_would_read_it():
    """It has not been built: no registry can be reached where this is tested."""
    found = instructions((CLUSTER / "Dockerfile").read_text())
    known = {"FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD", "ARG", "LABEL", "ENTRYPOINT"}
    assert {name for name, _ in found} <= known
    assert found[0] == ("FROM", "nvidia/cuda:12.8.1-base-ubuntu24.04"), "a tag that says what is in it"
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
            assert "apt-get" not in rest or ("update" in rest and "rm -rf /var/lib/apt/lists/*" in rest)
        if name == "COPY":
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
    users = [rest for name, rest in found if name == "USER"]
    assert users == ["ray"], "nothing runs as root"
    assert any(
        "useradd" in rest and "--uid 1001" in rest and rest.endswith("sudoers.d/ray") for _, rest in found
    )
    assert "chown 1001:1001 /shared" in (CLUSTER / "gpu.yaml").read_text(), "the same user owns the storage"


def test_the_ray_job_of_kubernetes_is_whole():
    import ray

    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"].rpartition(".")[0] == ray.__version__.rpartition(".")[0]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"]) == (0, 0)
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["image"] == "REGISTRY/pmpd:0.1.0"
        names = {entry["name"]: entry for entry in container["env"]}
        assert names["RAY_AUTH_MODE"]["value"] == "token"
        assert names["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "pmpd-token"
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    assert pods(job)[2]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def documented_commands() -> list[list[str]]:
    text = (CLUSTER / "README.md").read_text() + (CLUSTER / "kuberay.yaml").read_text()
    text = re.sub(r"\\\n\s*|\n    --", lambda match: " --" if "--" in match[0] else " ", text)
    found = re.findall(r"(?:-- |entrypoint: >-\n\s*)pmpd ([^\n#]*)", text)
    found += re.findall(r"cluster/slurm\.sh ([^\n#…]*)\n```", text)
    return [line.replace("` ", " ").split() for line in found]


def test_every_documented_command_parses():
    import importlib

    import tyro

    from pmpd.cli.main import COMMANDS

    commands = documented_commands()
    assert {command[0] for command in commands} >= {"quantize", "label"}
    assert len(commands) >= 5
    for name, *flags in commands:
        module = importlib.import_module(f"pmpd.cli.flags.{COMMANDS[name].module}")
        tyro.cli(getattr(module, COMMANDS[name].flags), args=flags)


def test_the_dashboard_shows_the_metrics_that_a_run_publishes():
    from pmpd.farm.metrics import HELP

    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    asked = set(re.findall(r"ray_pmpd_(\w+)", json.dumps(dashboard["panels"])))
    assert asked == {*HELP, "precision_tokens"}


def test_the_readme_leads_from_nothing_to_the_parquet():
    text = (CLUSTER / "README.md").read_text()
    steps = ["docker build", "ray get-auth-token --generate", "create-security-group", "--port 2049",
             "ray up cluster", "export RAY_AUTH_MODE=token", "pmpd quantize", "pmpd label", "pmpd inspect",
             "pmpd compact", "read_parquet", "ray down"]  # fmt: skip
    places = [text.find(step, text.find("## 1.")) for step in steps]
    assert -1 not in places, dict(zip(steps, places, strict=True))
    assert places == sorted(places), "the steps come in the order in which they are done"
    assert "CloudShell" not in text + (CLUSTER / "gpu.yaml").read_text()


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path):
    """(environment, log) of a Slurm of two nodes whose programs only write down what they are asked. The head
    listens, as Ray's would."""
    tools, venv = tmp_path / "tools", tmp_path / "venv" / "bin"
    tools.mkdir()
    venv.mkdir(parents=True)
    log = tmp_path / "log"
    stand_in(tools, "scontrol", "printf 'node1\\nnode2\\n'\n")
    stand_in(
        tools,
        "srun",
        f"""echo "srun $*" >> {log}
case "$*" in
  *"hostname --ip-address"*) echo 127.0.0.1;;
  *"ray start --head"*) port=$(sed 's/.*--port=\\([0-9]*\\).*/\\1/' <<< "$*")
    exec {sys.executable} -c "
import signal, socket, sys
server = socket.create_server(('127.0.0.1', $port))
signal.signal(signal.SIGTERM, lambda *_: (open('{log}', 'a').write('head ended\\n'), sys.exit(0)))
while True: server.accept()[0].close()";;
  *) exec sleep 600;;
esac
""",
    )
    stand_in(
        venv,
        "pmpd",
        f"""until grep -q -- "start --address" {log}; do sleep 0.1; done
echo "pmpd $* at $RAY_ADDRESS mode $RAY_AUTH_MODE token ${{#RAY_AUTH_TOKEN}}" >> {log}
trap 'echo "pmpd got TERM" >> {log}; exit 143' TERM
[ "$1" = wait ] && {{ touch {log}.ready; sleep 60 & wait $!; }}
[ "$1" = fail ] && exit 3
exit 0
""",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PMPD_VENV": str(venv.parent),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "16", "PMPD_RAY_PORT": str(port),
    }  # fmt: skip
    return environment, log


@pytest.mark.parametrize(("command", "code"), [("label", 0), ("fail", 3)])
def test_slurm_starts_ray_on_all_nodes_and_gives_the_commands_exit_code(slurm, command, code):
    environment, log = slurm
    run = subprocess.run(
        [CLUSTER / "slurm.sh", command, "--size", "4"],
        env=environment,
        capture_output=True,
        timeout=120,
        text=True,
    )
    assert run.returncode == code, run.stderr
    text = log.read_text()
    port = environment["PMPD_RAY_PORT"]
    assert f"-w node1 ray start --head --node-ip-address=127.0.0.1 --port={port}" in text
    assert f"-w node2 ray start --address=127.0.0.1:{port}" in text
    assert text.count("--num-gpus=8") == 2
    assert f"pmpd {command} --size 4 at 127.0.0.1:{port} mode token token 64" in text
    assert "head ended" in text, "the Ray of the job ends with it"
    assert not list(Path(environment["TMPDIR"]).glob("pmpd-77-*"))


def test_slurms_signal_reaches_the_command(slurm):
    environment, log = slurm
    run = subprocess.Popen([CLUSTER / "slurm.sh", "wait"], env=environment)
    ready = Path(f"{log}.ready")
    for _ in range(600):
        if ready.exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    run.terminate()
    assert run.wait(timeout=60) == 143
    assert "pmpd got TERM" in log.read_text()
    assert "head ended" in log.read_text()


def test_slurm_says_what_is_missing(slurm):
    environment, _ = slurm
    for arguments, change, told in (
        ([], {}, "usage: sbatch"),
        (["label"], {"PMPD_VENV": "/none"}, "set PMPD_VENV"),
    ):
        run = subprocess.run(
            [CLUSTER / "slurm.sh", *arguments], env={**environment, **change}, capture_output=True, text=True
        )
        assert run.returncode == 2
        assert told in run.stderr
