"""What a value must be where it enters: a path, a truth value, one of a few names, a seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatial_tokens.errors import SpatialTokensError, shown

SEEDS = range(-(2**63), 2**64)  # what torch.manual_seed takes


def as_path(value: Any, name: str = "a file or directory") -> Path:
    """A path, unlike `Path` never the working directory for an empty string.

    Raises:
        SpatialTokensError: If it is neither a string nor a path, or empty.
    """
    try:
        path = Path(value)
    except TypeError as error:
        raise SpatialTokensError(f"{name} must be a path, got {shown(value)}") from error
    if value == "":
        raise SpatialTokensError(f"{name} must be a path, got an empty string")
    return path


def check_bool(**values: Any) -> None:
    """Raises SpatialTokensError, with its name, if a value is not a bool."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise SpatialTokensError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Raises SpatialTokensError unless a value is one of a few names; an array, which has no single truth value, is not."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        known = [repr(choice) for choice in choices]
        raise SpatialTokensError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {shown(value)}")


def check_seed(seed: Any) -> None:
    """Raises SpatialTokensError unless torch can be seeded with it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS:
        raise SpatialTokensError(f"seed must be an integer from -2**63 to 2**64 - 1, got {shown(seed)}")
