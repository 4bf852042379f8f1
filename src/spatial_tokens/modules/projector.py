"""The whole projector (LLaVA-SP, figure 2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from types import NoneType
from typing import Any, Literal, overload

import torch
from torch import nn

from spatial_tokens.checks import as_path
from spatial_tokens.config import FACTORS, SPProjectorConfig
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.grid import is_positive_int
from spatial_tokens.modules.extractor import SpatialFeatureExtractor
from spatial_tokens.modules.factorized_extractor import FactorizedFeatureExtractor
from spatial_tokens.modules.heads import LinearHead, MLPHead
from spatial_tokens.modules.initialization import checked_factory, reset
from spatial_tokens.modules.inputs import GridSizes, as_grid_list, require_own_grid
from spatial_tokens.modules.integrator import DetailFeatureIntegrator
from spatial_tokens.modules.parts import OWN, PARTS, build, describe
from spatial_tokens.storage import hub, pretrained, sharded
from spatial_tokens.storage.int8 import require_plain
from spatial_tokens.storage.model_card import PAPER, render_model_card

_LOADING = """
import torch
from spatial_tokens import SPProjector

projector = SPProjector.from_pretrained("{repo_id}")
tokens = projector(torch.randn(1, {patches}, {width}))  # the patch features of an image
"""


class SPProjector(nn.Module):
    """Patch features in, spatial tokens and patch tokens out, in the language model's width.

    Most people call `SPProjector.from_config`. The constructor composes parts of your own: any extractor that maps `(B, N, C)`
    to `(B, K, S)` (those of `modules.ablations`, say), an integrator or None, and two heads. `num_spatial_tokens` is the
    extractor's: give one of your own an attribute of that name. docs/own-parts.md shows how parts of your own are saved.

    Args:
        extractor: Patch features `(B, N, C)` to spatial tokens `(B, K, S)`.
        integrator: A DetailFeatureIntegrator, which makes them `(B, K, 2S)`, or None.
        spatial_head: Spatial tokens to `(B, K, D)`.
        patch_head: Patch features to `(B, N, D)`, or None where something else projects them.

    Shape:
        - Input: `(B, N, C)`: the vision encoder's layer -2, the grid's rows one after another, without class token.
        - Output: `(B, K + N, D)`, the spatial tokens first; `(B, K, D)` without a patch head. With `return_attention=True` also
          the integrator's attention `(B, K, P)` over the detail map (figure 5).

    Raises:
        SpatialTokensError: At construction if the parts' widths or grids do not go together; in `forward` if the input does
            not fit.

    Examples:
        >>> config = SPProjectorConfig(
        ...     vision_hidden_size=32, text_hidden_size=64, grid_size=(8, 8), kernel_sizes=(4, 8),
        ...     spatial_hidden_size=16, detail_kernel_size=4,
        ... )
        >>> projector = SPProjector.from_config(config)
        >>> tokens, attention = projector(torch.randn(2, 64, 32), return_attention=True)
        >>> tokens.shape, attention.shape
        (torch.Size([2, 66, 64]), torch.Size([2, 2, 9]))
    """

    def __init__(
        self,
        extractor: nn.Module,
        integrator: DetailFeatureIntegrator | None,
        spatial_head: nn.Module,
        patch_head: nn.Module | None,
    ) -> None:
        super().__init__()
        _check_parts(extractor, integrator, spatial_head, patch_head)
        self.extractor = extractor
        self.integrator = integrator
        self.spatial_head = spatial_head
        self.patch_head = patch_head

    @classmethod
    def from_config(
        cls, config: SPProjectorConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SPProjector:
        """The projector that a config describes, freshly initialized; `device="meta"` allocates nothing.

        Raises:
            SpatialTokensError: If it is not an SPProjectorConfig.
        """
        if not isinstance(config, SPProjectorConfig):
            raise SpatialTokensError(
                f"config must be an SPProjectorConfig, got {shown(config)}; make one: SPProjectorConfig.from_preset(...)"
            )
        c, s, d = config.vision_hidden_size, config.spatial_hidden_size, config.text_hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape: dict[str, Any] = {
            "grid_size": config.grid_size, "kernel_sizes": config.kernel_sizes, "variant": config.variant, **factory
        }  # fmt: skip
        factors: dict[str, Any] = {"rank": config.rank, "spatial_basis": config.spatial_basis}
        extractor = (
            SpatialFeatureExtractor(c, s, **shape)
            if config.rank is None
            else FactorizedFeatureExtractor(c, s, frequencies=config.frequencies, **factors, **shape)
        )
        integrator, spatial_features = None, s
        if config.detail_kernel_size is not None and config.detail_stride is not None:
            integrator = DetailFeatureIntegrator(
                c,
                s,
                grid_size=config.grid_size,
                kernel_size=config.detail_kernel_size,
                stride=config.detail_stride,
                frequencies=config.detail_frequencies,
                **factors,
                **factory,
            )
            spatial_features = integrator.out_features
        spatial_head = (
            MLPHead(spatial_features, d, **factory)
            if config.spatial_head == "mlp"
            else LinearHead(spatial_features, d, bias=config.spatial_head_bias, **factory)
        )
        patch_head = None if config.patch_head is None else MLPHead(c, d, **factory)
        return cls(extractor, integrator, spatial_head, patch_head)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], parts: Sequence[type[nn.Module]] = (), *, device: torch.device | str | None = None
    ) -> SPProjector:
        """The projector that `to_dict` describes, freshly initialized.

        Args:
            values: What `to_dict` gave.
            parts: The classes of parts that are not this library's.
            device: Where it is made.

        Raises:
            SpatialTokensError: If the values describe no projector, or a class is missing.
        """
        if isinstance(values, Mapping) and PARTS in values:
            return cls(**build(values, parts, device=device))  # type: ignore[arg-type]  # the constructor checks them
        return cls.from_config(SPProjectorConfig.from_dict(dict(values)), device=device)

    def to_dict(self) -> dict[str, Any]:
        """What builds this projector again, as plain values: the fields of its config, or the class and arguments of each part.

        Raises:
            SpatialTokensError: If an argument of a part cannot be read off it.
        """
        return self.config.to_dict() if self._has_config() else describe(self)

    def _has_config(self) -> bool:
        try:
            return bool(self.config)
        except SpatialTokensError:
            return False

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K` an image, as the extractor's `num_spatial_tokens` says.

        Raises:
            SpatialTokensError: If an extractor of the user's own has no such attribute, or it is not a positive integer.
        """
        count = getattr(self.extractor, "num_spatial_tokens", None)
        if not is_positive_int(count):
            raise SpatialTokensError(
                f"{type(self.extractor).__name__}.num_spatial_tokens must be a positive integer, got {shown(count)}; "
                "give the extractor an attribute with the number of tokens that it makes of an image"
            )
        return count

    @property
    def config(self) -> SPProjectorConfig:
        """The config that describes this projector, read off its parts.

        Raises:
            SpatialTokensError: If a part is not one that a config can describe.
        """
        extractor, integrator, head, patch_head = self.extractor, self.integrator, self.spatial_head, self.patch_head
        if not isinstance(extractor, (SpatialFeatureExtractor, FactorizedFeatureExtractor)):
            raise _not_described(extractor)
        if not isinstance(head, (MLPHead, LinearHead)):
            raise _not_described(head)
        if not isinstance(patch_head, (MLPHead, NoneType)):
            raise _not_described(patch_head)
        if not isinstance(integrator, (DetailFeatureIntegrator, NoneType)):
            raise _not_described(integrator)
        factorized = isinstance(extractor, FactorizedFeatureExtractor)
        factors: dict[str, Any] = {name: getattr(extractor, name) for name in FACTORS} if factorized else {}
        config = SPProjectorConfig(
            vision_hidden_size=extractor.vision_hidden_size,
            text_hidden_size=head.out_features,
            grid_size=extractor.grid_size,
            variant=extractor.variant,
            kernel_sizes=extractor.kernel_sizes,
            spatial_hidden_size=extractor.spatial_hidden_size,
            detail_kernel_size=integrator.kernel_size if integrator else None,
            detail_stride=integrator.stride if integrator else None,
            spatial_head="linear" if isinstance(head, LinearHead) else "mlp",
            spatial_head_bias=getattr(head.fc, "bias", None) is not None if isinstance(head, LinearHead) else True,
            patch_head=None if patch_head is None else "mlp",
            **factors,
        )
        if integrator is not None:
            expected = config.rank, config.detail_frequencies, config.spatial_basis
            found = integrator.rank, integrator.frequencies, integrator.spatial_basis
            if found != expected:
                raise SpatialTokensError(
                    f"no SPProjectorConfig describes an integrator of rank, frequencies and spatial_basis {found} with this "
                    f"extractor, whose would be {expected}; to_dict() does"
                )
        return config

    def reset_parameters(self) -> None:
        """Initializes every part again."""
        for part in self.children():
            reset(part)

    @property
    def any_grid(self) -> bool:
        """Whether every part that knows a grid reads patches of others too: `forward` then takes `grid_sizes`."""
        return all(getattr(part, "any_grid", False) for part in (self.extractor, self.integrator) if part is not None)

    @overload
    def forward(
        self, patches: torch.Tensor, grid_sizes: GridSizes | None = None, *, return_attention: Literal[False] = False
    ) -> torch.Tensor: ...
    @overload
    def forward(
        self, patches: torch.Tensor, grid_sizes: GridSizes | None = None, *, return_attention: Literal[True]
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, patches: torch.Tensor, grid_sizes: GridSizes | None = None, *, return_attention: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Patch features `(B, N, C)` to tokens `(B, K + N, D)`, and the attention `(B, K, P)` if asked.

        Args:
            patches: Patch features; of factorized kernels also `(sum of N, C)`, images of different grids one after another. The
                tokens are then `(sum of K + N, D)`, each image's spatial tokens before its own patches'.
            grid_sizes: For factorized kernels: the grid `(H, W)` of all images, or that of each, in a list, a tensor or an array.
            return_attention: Whether to return it.
        """
        if return_attention and self.integrator is None:
            raise SpatialTokensError("there is no attention to return: this projector has no DetailFeatureIntegrator")
        if not self.any_grid:
            require_own_grid(grid_sizes)
        grid_argument = () if grid_sizes is None else (grid_sizes,)
        spatial_tokens, attention = self.extractor(patches, *grid_argument), None
        if self.integrator is not None:
            spatial_tokens, attention = self.integrator(spatial_tokens, patches, *grid_argument, return_attention=True)
        tokens = self.spatial_head(spatial_tokens)
        if self.patch_head is not None:
            tokens = _before_patches(tokens, self.patch_head(patches), grid_sizes)
        return tokens if attention is None or not return_attention else (tokens, attention)

    @torch.no_grad()
    def to_dense(self) -> SPProjector:
        """A copy with the dense kernels that factorized ones are on their own grid: it gives the same tokens, but for rounding.

        Raises:
            SpatialTokensError: If a factor is wrapped or quantized.
        """
        extractor, integrator = self.extractor, self.integrator
        extractor = extractor.to_dense() if isinstance(extractor, FactorizedFeatureExtractor) else copy.deepcopy(extractor)
        integrator = integrator and integrator.to_dense()
        spatial_head, patch_head = copy.deepcopy((self.spatial_head, self.patch_head))
        return SPProjector(extractor, integrator, spatial_head, patch_head).train(self.training)

    def exact_state_dict(self) -> dict[str, torch.Tensor]:
        """The state dict, once it is sure that it is the config's: no part is wrapped by an adapter or a quantizer.

        Weights may be torchao's weight-only int8, which weight files can hold.

        Raises:
            SpatialTokensError: If a tensor is missing, unexpected or wrongly shaped (they are listed), or quantized otherwise.
        """
        classes = [type(part) for part in self.children() if type(part) not in OWN]
        expected = SPProjector.from_dict(self.to_dict(), list(dict.fromkeys(classes)), device="meta").state_dict()
        tensors = sharded.tensors_of(self)
        require_plain(tensors, "this projector cannot be saved", int8=True)
        pretrained.require_exactly(
            {name: tensor.shape for name, tensor in expected.items()},
            tensors,
            "this projector (if a part is wrapped, merge or unload it first)",
        )
        return tensors

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into a directory, each completely or not at all.

        Of a projector that is sharded over processes (FSDP2, ZeRO-3, tensor parallelism) every one must call this; the first
        writes.

        Raises:
            SpatialTokensError: If the arguments of a part cannot be read off it (it is wrapped, say), parameters are on the meta
                device, or the files cannot be written.
        """
        folder = as_path(directory, "directory")
        tensors = sharded.gathered(self.exact_state_dict())
        if tensors:
            pretrained.save(folder, self.to_dict(), tensors)

    def push_to_hub(self, repo_id: str, *, datasets: Sequence[str] = (), **options: Any) -> str:
        """Uploads what `save_pretrained` writes, with a model card, to the Hugging Face Hub; see `storage.hub.push`.

        Args:
            repo_id: The repository, "user/name", which is made if it is not there.
            datasets: What it was trained on, by names on the Hub, for the card.
            **options: `private`, `token`, `revision`, `commit_message`.

        Returns:
            The repository's address; "" in a process of a sharded projector that does not write.

        Raises:
            SpatialTokensError: If the files cannot be written or sent.
        """
        config = self.config
        card = partial(
            render_model_card,
            repo_id,
            config,
            summary=f"A projector that makes visual spatial tokens of patch features, in the design of [LLaVA-SP]({PAPER}).",
            code=_LOADING.format(repo_id=repo_id, patches=config.num_patches, width=config.vision_hidden_size),
            facts={"channels": f"{config.vision_hidden_size} of patches, {config.text_hidden_size} of tokens"},
            datasets=datasets,
        )
        return hub.push(self.save_pretrained, repo_id, card, **options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        parts: Sequence[type[nn.Module]] = (),
    ) -> SPProjector:
        """The projector that `save_pretrained` or `push_to_hub` wrote: on the CPU and in its own dtype, unless told otherwise.

        Args:
            directory: What `save_pretrained` wrote, or "user/name" on the Hugging Face Hub.
            revision: A branch, tag or commit of the repository.
            device: Where it is to be.
            dtype: Of its parameters.
            parts: The classes of parts that are not this library's.

        Raises:
            SpatialTokensError: If a file is missing or damaged, the tensors are not exactly the config's, the device or dtype is
                not one that parameters can have, or the repository cannot be downloaded.
        """
        checked_factory(device, dtype)
        folder = hub.folder_of(directory, (pretrained.CONFIG_NAME, pretrained.WEIGHTS_NAME), revision)
        values, tensors = pretrained.load(folder)
        projector = cls.from_dict(values, parts, device=None if PARTS in values else "meta")
        pretrained.assign(projector, tensors, str(folder), dtype)
        return projector.to(device=device)


def _not_described(part: nn.Module) -> SpatialTokensError:
    kind = type(part).__name__
    return SpatialTokensError(f"no SPProjectorConfig describes a projector with a {kind}; to_dict() does")


def _before_patches(tokens: torch.Tensor, patches: torch.Tensor, grid_sizes: GridSizes | None) -> torch.Tensor:
    """Each image's spatial tokens before its patch tokens: `(B, K + N, D)`, or `(sum of K + N, D)` of packed images."""
    if patches.ndim == tokens.ndim:
        return torch.cat([tokens, patches], dim=1)
    lengths = [height * width for height, width in as_grid_list(grid_sizes)]
    images = zip(tokens, torch.split(patches, lengths), strict=True)
    return torch.cat([each for pair in images for each in pair]) if lengths else patches


def _check_parts(
    extractor: nn.Module, integrator: DetailFeatureIntegrator | None, spatial_head: nn.Module, patch_head: nn.Module | None
) -> None:
    """Raises SpatialTokensError if a part is no module, or the widths that two parts name disagree; a part may name none."""
    parts = {"extractor": extractor, "integrator": integrator, "spatial_head": spatial_head, "patch_head": patch_head}
    for name, module in parts.items():
        if not isinstance(module, nn.Module) and not (module is None and name in ("integrator", "patch_head")):
            raise SpatialTokensError(f"{name} must be an nn.Module, got {shown(module)}; build it first")
    before_head = extractor if integrator is None else integrator
    agreements = [
        ("spatial_head", "in_features", before_head, "spatial_hidden_size" if integrator is None else "out_features"),
        ("patch_head", "in_features", extractor, "vision_hidden_size"),
        ("patch_head", "out_features", spatial_head, "out_features"),
        *(("integrator", name, extractor, name) for name in ("vision_hidden_size", "spatial_hidden_size", "grid_size")),
    ]
    for part, name, other, other_name in agreements:
        given, expected = getattr(parts[part], name, None), getattr(other, other_name, None)
        if None not in (given, expected) and given != expected:
            raise SpatialTokensError(
                f"{part}.{name} is {given}, but {other_name} of the {type(other).__name__} is {expected}; build them for each other"
            )
