"""Unfinished multipart uploads of S3: invisible, paid for, and left behind by a writer that was killed.

pyarrow has no call for them, so they are ended with boto3 where it is installed (`pip install 'pmpd[s3]'`).
Without it, give the bucket a lifecycle rule (AbortIncompleteMultipartUpload).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from pmpd.storage.uri import connected, split


def abort_uploads(path: str | Path) -> int:
    """Ends the unfinished uploads at or below an `s3://` path; how many there were. Only for the one run that
    holds the folder. 0 elsewhere, without boto3, or where the store refuses: nothing depends on it."""
    location, user, query = split(connected(path))
    scheme, _, rest = location.partition("://")
    if scheme != "s3":
        return 0
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return 0
    settings = {key: values[0] for key, values in parse_qs(query.removeprefix("?")).items()}
    options: dict[str, Any] = {
        "config": Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 2})
    }
    if user:
        key, _, secret = user.rstrip("@").partition(":")
        options |= {"aws_access_key_id": unquote(key), "aws_secret_access_key": unquote(secret)}
    if "region" in settings:
        options["region_name"] = settings["region"]
    endpoint = settings.get("endpoint_override")
    if endpoint:
        options["endpoint_url"] = (
            endpoint if "://" in endpoint else f"{settings.get('scheme', 'https')}://{endpoint}"
        )
    bucket, _, prefix = rest.partition("/")
    ended = 0
    with contextlib.suppress(BotoCoreError, ClientError, ValueError):
        client = boto3.client("s3", **options)
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if upload["Key"] == prefix or upload["Key"].startswith(prefix.rstrip("/") + "/"):
                    client.abort_multipart_upload(
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    ended += 1
    return ended
