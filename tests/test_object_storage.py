"""Object stores as people use them: URIs with an endpoint and keys in them, all commands on S3 (moto's
server, on loopback), and what a driver or a credential that is missing reads like."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pmpd import storage
from pmpd.cli.main import main as run_command
from pmpd.errors import UserError
from pmpd.storage import uri
from tests.helpers import write_dense
from tests.ray_sessions import local_ray

KEY, SECRET = "AKIAPLANTEDKEY", "planted/secret+VALUE"
QUOTED = SECRET.replace("/", "%2F").replace("+", "%2B")
REGION = "us-west-7"
"""No other text says it, so that what the query says is found where it should not be."""


class Bucket:
    """One bucket of a server of its own, and what it was asked."""

    def __init__(self, port: int, client):
        self.port, self.client = port, client

    def uri(self, path: str = "") -> str:
        query = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region={REGION}"
        return f"s3://{KEY}:{QUOTED}@results/{path}?{query}"

    def objects(self) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="results")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket="results", Key=key)["Body"].read() for key in keys}

    def uploads(self) -> list[str]:
        return [
            item["Key"] for item in self.client.list_multipart_uploads(Bucket="results").get("Uploads", [])
        ]


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    import boto3

    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    port = running._server.socket.getsockname()[1]
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket="results")
    yield Bucket(port, client)
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """The bucket, empty; a process that knows no connection, and no credentials but those of the URI."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(uri, "_connections", {})
    for key in server.objects():
        server.client.delete_object(Bucket="results", Key=key)
    return server


def rows(count: int) -> list[dict]:
    return [{"prompt_id": f"{i:016x}", "prompt_tokens": i, "prompt_text": "x" * 40} for i in range(count)]


@pytest.mark.parametrize("as_command", [False, True])
def test_folders_of_a_uri_with_a_query_are_joined_inside_the_path(bucket, as_command):
    dataset = bucket.uri("a/prompts")
    if as_command:
        dataset = storage.without_secrets(dataset)
        assert dataset == "s3://results/a/prompts"
    path = storage.join(storage.data_folder(dataset), "part-0.parquet")
    storage.write_shard(storage.to_table(rows(5), storage.PROMPTS), path)
    storage.write_manifest(dataset, storage.PROMPTS, {"where": dataset}, table="prompts", complete=True)
    assert sorted(bucket.objects()) == ["a/prompts/data/part-0.parquet", "a/prompts/manifest.json"]
    assert len(storage.scan(dataset).shards[0].ids) == 5
    assert storage.read_manifest(storage.data_folder(dataset))["config"] == {
        "where": "s3://results/a/prompts"
    }
    aside = storage.set_aside(storage.list_shards(dataset)[0], dataset)
    assert storage.exists(aside)
    assert storage.list_shards(dataset) == []


def test_one_location_has_one_connection_and_the_nearest_counts(monkeypatch):
    monkeypatch.setattr(uri, "_connections", {})
    assert uri.without_secrets("--output-dir=s3://b/x?region=one") == "--output-dir=s3://b/x"
    uri.without_secrets("s3://b/x/y?region=two")
    assert uri.connected("s3://b/x/z") == "s3://b/x/z?region=one"
    assert uri.connected("s3://b/x/y/z") == "s3://b/x/y/z?region=two"
    assert uri.connected("s3://b/xy") == "s3://b/xy"
    with pytest.raises(UserError, match=r"s3://b/x: given with two"):
        uri.without_secrets("s3://b/x?region=three")
    container = "abfs://container@account.dfs.core.windows.net/x"
    assert uri.without_secrets(container) == container, "Azure's container is no secret"


@pytest.mark.parametrize(
    "given",
    [
        f"s3://{KEY}:{SECRET}@results/x",  # a "/" that should have been %2F
        f"s3://{KEY}:{QUOTED} @results/x",
        f"s3://{KEY}:{QUOTED}@results/x?nonsense={QUOTED}",
        f"foo://{KEY}:{QUOTED}@results/x",
        f"s3://{KEY}:{QUOTED}@results/x?endpoint_override=127.0.0.1:9&scheme=http&region={REGION}",
        f"abfs://:{SECRET}==@account/container/x",
    ],
)
def test_a_uri_that_can_not_be_used_is_told_without_its_secrets(monkeypatch, capsys, given):
    monkeypatch.setattr(uri, "_connections", {})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError) as caught:
        storage.read_manifest(given)
    assert run_command(["inspect", given]) == 1
    told = str(caught.value) + "".join(capsys.readouterr())
    assert "error: " in told
    for secret in (KEY, SECRET, QUOTED, REGION, "127.0.0.1:9"):
        assert secret not in told


def test_small_files_are_one_put(bucket, monkeypatch):
    asked = []
    from moto.s3.responses import S3Response

    for name in ("put_object", "upload_part"):
        real = getattr(S3Response, name)

        def seen(self, *arguments, _name=name, _real=real):
            asked.append(_name)
            return _real(self, *arguments)

        monkeypatch.setattr(S3Response, name, seen)
    storage.write_bytes(bucket.uri("small"), b"x" * 100_000)
    assert asked == ["put_object"]


def test_an_upload_that_was_cut_short_is_ended_by_the_next_run(bucket):
    for key in ("run/data/part-1.parquet", "run/_x", "runner/data/part-2.parquet"):
        begun = bucket.client.create_multipart_upload(Bucket="results", Key=key)
        bucket.client.upload_part(
            Bucket="results", Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"half"
        )
    with storage.Lease(bucket.uri("run")):
        assert bucket.uploads() == ["runner/data/part-2.parquet"], "only those of the folder that is held"
    storage.remove_temporary(bucket.uri("runner"))
    assert bucket.uploads() == []


def test_an_upload_that_fails_is_ended_and_told(bucket, monkeypatch):
    from moto.s3.responses import S3Response

    real, told = S3Response.upload_part, threading.Event()

    def refuse(self, *arguments):
        told.set()
        return 403, {}, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"

    monkeypatch.setattr(S3Response, "upload_part", refuse)
    with pytest.raises(storage.ShardWriteError, match=r"s3://results/big: can't be written") as caught:
        storage.write_bytes(bucket.uri("big"), b"x" * 30_000_000)
    assert told.is_set(), "this file must be large enough for an upload in parts"
    assert SECRET not in str(caught.value)
    assert bucket.uploads() == []
    assert "big" not in bucket.objects()
    monkeypatch.setattr(S3Response, "upload_part", real)


def test_a_store_that_refuses_damages_no_shard(bucket, monkeypatch):
    """Credentials that ran out in the middle of a scan once set good shards aside."""
    from moto.s3.responses import S3Response

    path = storage.join(storage.data_folder(bucket.uri("d")), "part-0.parquet")
    storage.write_shard(storage.to_table(rows(3), storage.PROMPTS), path)
    monkeypatch.setattr(
        S3Response,
        "get_object",
        lambda self, *arguments: (403, {}, "<Error><Code>ExpiredToken</Code><Message>no</Message></Error>"),
    )
    with pytest.raises(storage.StorageError, match=r"s3://results/d/data/part-0\.parquet.*credentials"):
        storage.scan(bucket.uri("d"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "hdfs://namenode:8020/x",
            r"hdfs://namenode:8020/x: .*; install Java and Hadoop's client.*CLASSPATH",
        ),
        (
            "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1",
            r"gs://bucket/x: .*; check the bucket's name and the credentials \(GOOGLE_APPLICATION",
        ),
        ("abfs://x", r"abfs://x: .*; write abfs://CONTAINER@ACCOUNT\.dfs\.core\.windows\.net/FOLDER"),
        ("foo://x", r"foo://x: .*; give a local path or a URI that pyarrow knows"),
    ],
)
def test_a_driver_or_a_credential_that_is_missing_is_one_line_with_the_cure(given, told, monkeypatch):
    monkeypatch.setattr(uri, "_connections", {})
    with pytest.raises(UserError, match=told) as caught:
        storage.exists(given)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_store_is_copied_once_and_again_where_it_changed(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    for name, content in {"config.json": "{}", "sub/weights": "w", "old": "o"}.items():
        (source / name).write_text(content)
    storage.upload_folder(source, bucket.uri("model"))
    copy = storage.download_folder(bucket.uri("model"))
    names = {path.name for path in copy.rglob("*") if not path.name.startswith(".")}
    assert names == {"config.json", "sub", "weights", "old"}
    before = (copy / "sub" / "weights").stat().st_mtime_ns
    bucket.client.delete_object(Bucket="results", Key="model/old")
    bucket.client.put_object(Bucket="results", Key="model/config.json", Body=b'{"a": 1}')
    storage.download_folder(bucket.uri("model"))
    assert (copy / "config.json").read_text() == '{"a": 1}'
    assert not (copy / "old").exists()
    assert (copy / "sub" / "weights").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"--model-path s3://results/none: nothing there"):
        storage.download_folder(bucket.uri("none"))


@pytest.mark.slow
def test_all_commands_work_on_s3_and_no_secret_is_printed_or_stored(bucket, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_dense(tmp_path / "dense")
    storage.upload_folder(tmp_path / "dense", bucket.uri("dense"))
    texts = "\n\n".join(f"Text {i} says that {i} and {i * 7} are numbers of some kind." for i in range(60))
    storage.write_bytes(bucket.uri("texts.txt"), texts.encode())
    dense, quantized, labels = bucket.uri("dense"), bucket.uri("anyprec"), bucket.uri("labels")
    commands = [
        ["quantize", "--model-path", dense, "--dataset", bucket.uri("texts.txt"), "--output-dir", quantized,
         "--num-calibration-samples", "2", "--calibration-length", "16", "--parent-precision", "4",
         "--seed-precision", "2", "--tuning-steps", "2", "--gpus-per-worker", "0"],
        ["label", "--model-path", quantized, "--reference-model-path", dense, "--output-dir", labels,
         "--dataset", bucket.uri("texts.txt"), "--size", "48", "--max-new-tokens", "8", "--num-workers", "1",
         "--precisions", "4,2"],
        ["train", "--data-path", labels, "--output-dir", bucket.uri("train"), "--num-train-epochs", "1"],
        ["generate", "--model-path", quantized, "--reference-model-path", dense, "--precisions", "4,2",
         "--output-dir", bucket.uri("generate"), f"--classifier-path={bucket.uri('train/scheduler')}",
         "--question-end", "2", "--max-new-tokens", "8", "--num-workers", "0",
         "--schedulers", "fp,uniform,kv_cache"],
        ["report", "--inputs", bucket.uri("generate"), "--output-dir", bucket.uri("report"),
         "--resamples", "100"],
        ["inspect", labels],
    ]  # fmt: skip
    with local_ray(num_cpus=2):
        for command in commands:
            assert run_command(command) == 0, (command[0], capfd.readouterr().err[-2000:])
    objects = bucket.objects()
    hidden = {name for name in objects if "/." in name and not name.endswith(".validate_storage_marker")}
    assert not hidden, "what was kept for another worker is gone, only Ray Train leaves something"
    for made in ("anyprec/config.json", "labels/labels/manifest.json", "train/scheduler/config.json",
                 "report/report.html", "report/report.md", "report/scores/manifest.json"):  # fmt: skip
        assert made in objects
    printed = capfd.readouterr()
    local = {
        str(path): path.read_bytes()
        for folder in (tmp_path, Path("/tmp/ray/session_latest/logs"))
        for path in folder.rglob("*")
        if path.is_file()
    }
    for secret in (KEY, SECRET, QUOTED, REGION):
        assert secret not in printed.out + printed.err
        for name, content in {**objects, **local}.items():
            assert secret.encode() not in content, f"{name} holds {secret}"
