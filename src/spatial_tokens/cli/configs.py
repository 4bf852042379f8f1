"""The config that a command is given: a preset's name, a file, or a folder with one."""

import os

from spatial_tokens.checks import as_path
from spatial_tokens.config import SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.text import read_text


def read_config(name: str) -> SPProjectorConfig:
    """The config; the error of a file that holds none names it."""
    path = as_path(name, "the config")
    if os.path.isdir(path):  # which, unlike Path.is_dir(), takes any name
        path /= "config.json"
    elif path.suffix != ".json" and not os.path.isfile(path):
        return SPProjectorConfig.from_preset(name)
    try:
        return SPProjectorConfig.from_json(read_text(path))
    except SpatialTokensError as error:
        raise error if str(path) in str(error) else SpatialTokensError(f"{path} is no config of a projector: {error}") from error
