"""What a command prints without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the caller can mend. Its text says what was given, what is allowed and what to do.

    Any other exception that leaves a command is a fault of this program and keeps its traceback.
    """
