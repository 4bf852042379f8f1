"""A preset fitted to the model of another codebase."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError, shown


def require(host: object, what: str, *paths: str) -> None:
    """Raises SpatialTokensError unless the host has an attribute at each of these dotted paths, as `what` is expected has."""
    for path in paths:
        try:
            attrgetter(path)(host)
        except AttributeError as error:
            raise SpatialTokensError(f"this {type(host).__name__} has no {path}; expected {what}") from error


def fitted(preset: str, fields: Mapping[str, Any], **of_host: Any) -> SPProjectorConfig:
    """The preset with the host's own values, and fields in place of the rest.

    Factorized kernels read any grid: they keep the preset's, of which their windows are shares.

    Raises:
        SpatialTokensError: If the preset or a field is unknown, the result is not valid, or a field contradicts the host.
    """
    base = SPProjectorConfig.from_preset(preset)
    if not isinstance(fields, Mapping):
        raise SpatialTokensError(f"fields of an SPProjectorConfig are given as a dict, got {shown(fields)}")
    if fields.get("rank", base.rank) is not None:
        of_host.pop("grid_size", None)
    config = SPProjectorConfig.from_preset(preset, **{**of_host, **fields})
    for name, value in of_host.items():
        given = getattr(config, name)
        if given != value:
            raise SpatialTokensError(f"{name} is {shown(given)}, but the model's is {value}; leave it out")
    return config
