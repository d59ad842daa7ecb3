"""Schema, row counts and nulls of a dataset; checks its manifest."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectJob:
    """Schema, row counts and nulls of a dataset; checks its manifest."""

    path: tyro.conf.Positional[str]
    """A dataset folder, a folder of them (results/label), or one Parquet file; local or a URI."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md)."""
