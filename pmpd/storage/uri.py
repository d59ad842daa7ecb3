"""Locations: local paths and URIs (`s3://bucket/folder?endpoint_override=…`), and what may be shown.

A URI's userinfo (a key and its secret) and query (an endpoint, a token) say how to connect, not what is
there. They are taken off where a URI comes in (`without_secrets`) and kept in this process; what is passed
on, printed and stored is the rest, and `connected` puts them on again where a file system is opened. Workers
are given them with `connections` and `connect`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

from pmpd.errors import UserError

_connections: dict[str, tuple[str, str]] = {}
"""Location without secrets -> userinfo with its "@", query with its "?": for it and all below it."""

_URI = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.-]*)://"
    r"(?:(?P<user>[^/?@]*|[^/?@:]*:(?!\d+/)[^?@]*)@)?(?P<rest>[^?]*)(?P<query>\?.*)?",
    re.DOTALL,
)
"""A secret with a "/" in it should have been written with %2F: it is a secret all the same."""


def is_uri(path: str | Path) -> bool:
    return "://" in str(path)


def split(path: str | Path) -> tuple[str, str, str]:
    """(location, userinfo with "@", query with "?"). A container of Azure's is in the place of a user, and
    part of the location: `abfs://container@account.dfs.core.windows.net/folder`."""
    text = str(path)
    match = _URI.fullmatch(text)
    if match is None:
        return text, "", ""
    scheme, user, rest, query = match["scheme"], match["user"], match["rest"], match["query"] or ""
    if user is not None and scheme.startswith(("abfs", "wasb")) and ":" not in user:
        return f"{scheme}://{user}@{rest}", "", query
    return f"{scheme}://{rest}", "" if user is None else f"{user}@", query


def shown(path: str | Path) -> str:
    """The path as it may be printed and stored: without userinfo and query."""
    return split(path)[0]


def join(path: str | Path, *parts: str) -> str:
    """Below a path: in front of a URI's query."""
    location, user, query = split(path)
    return _put(posixpath.join(location.rstrip("/"), *parts), user, query)


def base_name(path: str | Path) -> str:
    """The last component of the path."""
    return posixpath.basename(shown(path).rstrip("/"))


def parent(path: str | Path) -> str:
    """The folder the path is in."""
    location, user, query = split(path)
    scheme, separator, rest = location.rstrip("/").rpartition("://")
    return _put(f"{scheme}{separator}{posixpath.dirname(rest)}", user, query)


def _put(location: str, user: str, query: str) -> str:
    scheme, separator, rest = location.partition("://")
    return f"{scheme}://{user}{rest}{query}" if separator else location


def without_secrets(text: str) -> str:
    """A command-line argument (`URI` or `--flag=URI`) with how to connect taken off and kept.

    UserError where one location is given with two different ways to connect.
    """
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    location, user, query = split(value)
    if not (user or query):
        return text
    connect({location.rstrip("/"): (user, query)})
    return f"{flag}{equals}{location}"


def connect(known: Mapping[str, tuple[str, str]]) -> None:
    """Takes over how to connect to these locations."""
    for location, how in known.items():
        if _connections.setdefault(location, how) != how:
            raise UserError(
                f"{location}: given with two different endpoints or credentials; give it with one"
            )


def connections() -> dict[str, tuple[str, str]]:
    """How to connect, for another process. Secrets: nothing to print or to store."""
    return dict(_connections)


def connected(path: str | Path) -> str:
    """The URI with how to connect put on again: that of the longest location given that it lies in."""
    location, user, query = split(path)
    if user or query:
        return str(path)
    for known in sorted(_connections, key=len, reverse=True):
        if location == known or location.startswith(known + "/"):
            return _put(location, *_connections[known])
    return str(path)


def redacted(text: str, *uris: str | Path) -> str:
    """A text of others (an error of a driver, say) without what may not be shown: of these
    URIs, and of all that this process knows."""
    text = re.sub(
        r"([A-Za-z][\w+.-]*://)(?!\[)([^\s/?'\"@]*:[^\s/?'\"@]*)@", r"\1", text
    )  # what was never taken off: an error that repeats a URI
    for user, query in [*(split(uri)[1:] for uri in uris), *_connections.values()]:
        key, _, secret = user.rstrip("@").partition(":")
        values = [key, *(pair.partition("=")[2] for pair in query.removeprefix("?").split("&"))]
        for hidden in (secret, *(value for value in values if len(value) > 7)):
            text = text.replace(hidden, "…") if hidden else text
    return re.sub(r"([A-Za-z][\w+.-]*://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
