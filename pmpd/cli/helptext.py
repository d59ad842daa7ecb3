"""The help of a command's flags, as paragraphs: what stands under each field in the code, without its line
breaks. A default of None is not shown (the text says what happens then), and an argument without a flag has a
name."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal

import tyro

_DONE = "_has_paragraphs"
_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]


def with_paragraphs(flags: type) -> type:
    """The dataclass itself; its annotations carry the texts from now on."""
    if _DONE in vars(flags):
        return flags
    texts, hints = texts_of(flags), typing.get_type_hints(flags, include_extras=True)
    annotations = dict(hints)
    for field in fields(flags):
        hint = hints[field.name]
        kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if is_dataclass(kind):
            with_paragraphs(typing.cast(type, kind))
            continue
        shown: dict[str, Any] = {}
        if field.default is None:
            shown = {"help_behavior_hint": "", "metavar": _metavar(kind)}
        elif _POSITIONAL in marks:
            shown = {"help_behavior_hint": "", "metavar": field.name.upper()}
        elif field.default == ():
            shown = {"help_behavior_hint": ""}
        text = " ".join(texts.get(field.name, "").split())
        annotations[field.name] = Annotated[hint, tyro.conf.arg(help=text or None, **shown)]
    flags.__annotations__ = annotations
    setattr(flags, _DONE, True)
    return flags


def texts_of(flags: type) -> dict[str, str]:
    """Field -> the string under it, those of base classes too."""
    found: dict[str, str] = {}
    for base in reversed([base for base in flags.__mro__ if is_dataclass(base)]):
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        found |= {
            above.target.id: str(below.value.value)
            for above, below in zip(body.body, body.body[1:], strict=False)
            if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        }
    return found


def _metavar(kind: Any) -> str | None:
    """`INT` of `int | None`; None where it is no such thing."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else ()
    words = [_word(part) for part in parts if part is not types.NoneType]
    return "|".join(words) if words and all(words) else None


def _word(kind: Any) -> str:
    if kind in (int, float, str):
        return str(kind.__name__).upper()
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind):
        return " ".join(map(_word, typing.get_args(kind)))
    return ""
