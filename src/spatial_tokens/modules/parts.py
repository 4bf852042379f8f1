"""Projectors of parts that no SPProjectorConfig describes, as plain values: each part's class, by name, and its arguments.

As in scikit-learn, an argument of a part's constructor is an attribute of the same name. A file names classes; nothing is imported
because a file names it: classes that are not this library's are given by whoever loads the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spatial_tokens.errors import SpatialTokensError, reason, shown
from spatial_tokens.modules.ablations import SlidingWindowExtractor, TransformerExtractor
from spatial_tokens.modules.extractor import SpatialFeatureExtractor
from spatial_tokens.modules.factorized_extractor import FactorizedFeatureExtractor
from spatial_tokens.modules.heads import LinearHead, MLPHead
from spatial_tokens.modules.integrator import DetailFeatureIntegrator

PARTS = "parts"  # the entry that holds them
NAMES = ("extractor", "integrator", "spatial_head", "patch_head")
OWN: tuple[type[nn.Module], ...] = (
    SpatialFeatureExtractor, FactorizedFeatureExtractor, TransformerExtractor, SlidingWindowExtractor, DetailFeatureIntegrator,
    MLPHead, LinearHead,
)  # fmt: skip


def describe(projector: nn.Module) -> dict[str, Any]:
    """`{"parts": {"extractor": {"class": "GridPool", "arguments": {...}}, ...}}`, None for a part that is left out.

    Raises:
        SpatialTokensError: If an argument of a part cannot be read off it.
    """
    parts = {name: getattr(projector, name) for name in NAMES}
    return {PARTS: {name: None if part is None else _described(part) for name, part in parts.items()}}


def build(
    values: Any, classes: Sequence[type[nn.Module]] = (), *, device: torch.device | str | None = None
) -> dict[str, nn.Module | None]:
    """The parts that `describe` described, freshly initialized.

    Args:
        values: What `describe` gave.
        classes: The classes of the caller's own parts.
        device: Where they are made.

    Raises:
        SpatialTokensError: If the values are not a description, a class is unknown, or a constructor refuses its arguments.
    """
    if not isinstance(classes, Sequence) or not all(isinstance(each, type) and issubclass(each, nn.Module) for each in classes):
        raise SpatialTokensError(f"parts must be a list of nn.Module classes, got {shown(classes)}")
    known = {each.__name__: each for each in OWN}
    if twice := [each.__name__ for each in classes if known.setdefault(each.__name__, each) is not each]:
        raise SpatialTokensError(f"two classes are called {twice[0]}; parts are known by the names of their classes")
    described = values.get(PARTS) if isinstance(values, Mapping) else None
    if not isinstance(described, Mapping) or set(described) != set(NAMES):
        raise SpatialTokensError(f"a description of parts has {', '.join(NAMES)}, got {shown(described)}")
    return {name: None if described[name] is None else _built(name, described[name], known, device) for name in NAMES}


def _described(part: nn.Module) -> dict[str, Any]:
    kind = type(part)
    arguments = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name in ("device", "dtype"):
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise _not_described(part, f"its constructor takes any number of arguments ({parameter})")
        if not hasattr(part, name) or not _is_plain(value := getattr(part, name)):
            raise _not_described(part, f"it has no attribute {name!r} with the plain value of its constructor's argument")
        arguments[name] = value
    return {"class": kind.__name__, "arguments": arguments}


def _built(name: str, values: Any, known: Mapping[str, type[nn.Module]], device: torch.device | str | None) -> nn.Module:
    kind, arguments = (values.get("class"), values.get("arguments")) if isinstance(values, Mapping) else (None, None)
    if not isinstance(kind, str) or not isinstance(arguments, Mapping) or not _is_plain(arguments):
        raise SpatialTokensError(f"the {name} must have a class and arguments, got {shown(values)}")
    if kind not in known:
        raise SpatialTokensError(f"the {name} is a {kind}, which is not a class of this library; give the class: parts=[{kind}]")
    try:
        with torch.device(device or "cpu"):
            return known[kind](**{name: _with_tuples(value) for name, value in arguments.items()})
    except SpatialTokensError as error:
        raise SpatialTokensError(f"the {name}: {error}") from error
    except Exception as error:  # a constructor of the caller's raises what it likes
        raise SpatialTokensError(f"the {name} cannot be built: {kind}: {reason(error)}") from error


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back, but for tuples, which become lists."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _with_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_with_tuples, value))
    return {name: _with_tuples(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def _not_described(part: nn.Module, why: str) -> SpatialTokensError:
    return SpatialTokensError(
        f"no SPProjectorConfig describes a projector with a {type(part).__name__}, and {why}; "
        "if it wraps a part, merge or unload it first, else see docs/own-parts.md"
    )
