"""A folder of two files, a config and its weights, that can be loaded whole whenever its writer was killed."""

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import NamedTuple, TypeVar

import torch

from spatial_tokens.checks import as_path
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.storage.files import Tensors, atomic_write, make_directory, read_safetensors, write_tensors
from spatial_tokens.storage.text import read_text

Config = TypeVar("Config")


class FolderFormat(NamedTuple):
    """The names of the two files, and of the entry in the weights' metadata that is a copy of the config.

    The weights decide. They are renamed first, and the copy in them is what counts when config.json is of another save: because the
    writer was killed between the two files, or two wrote at once.
    """

    config_name: str
    weights_name: str
    metadata_entry: str

    def save(self, directory: str | PathLike[str], config: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes both files; neither takes its place before both are complete.

        Raises:
            SpatialTokensError: If they cannot be written; a file that was not replaced is as it was.
        """
        folder = make_directory(directory)
        with atomic_write(folder / self.config_name) as temporary:
            temporary.write_text(config, encoding="utf-8")
            write_tensors(folder / self.weights_name, tensors, {self.metadata_entry: config})

    def load(
        self, directory: str | PathLike[str], parse: Callable[[str], Config], wanted: Callable[[str], bool] = lambda name: True
    ) -> tuple[Config, Tensors]:
        """Reads both files: the config of the weights, parsed, and those weights that are wanted. Warns if config.json is another.

        Raises:
            SpatialTokensError: If one is missing or damaged.
        """
        folder = as_path(directory)
        config = parse(read_text(folder / self.config_name))
        tensors, metadata = read_safetensors(folder / self.weights_name, wanted)
        copy = metadata.get(self.metadata_entry)
        if copy is None:  # of another writer
            return config, tensors
        try:
            own = parse(copy)
        except SpatialTokensError as error:
            raise SpatialTokensError(f"the config in the metadata of {folder / self.weights_name}: {error}") from error
        if own != config:
            warnings.warn(
                f"{folder / self.config_name} is not the config that {self.weights_name} was saved with (an interrupted save, or "
                f"an edit); the copy in {self.weights_name} is used, and saving again rewrites {self.config_name}",
                stacklevel=3,
            )
        return own, tensors
