"""`SPProjectorConfig`: everything that defines a projector, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from math import prod
from typing import Any, Literal, NamedTuple, get_args

from spatial_tokens.checks import check_bool, check_choice
from spatial_tokens.errors import SpatialTokensError, reason, shown
from spatial_tokens.grid import (
    KernelSize,
    Size,
    SpatialBasis,
    Variant,
    as_frequencies,
    as_kernel_size,
    as_size,
    check_factors,
    check_fits,
    check_kernel_sizes,
    check_positive,
    is_positive_int,
    strided_grid_size,
)
from spatial_tokens.presets import PRESETS
from spatial_tokens.versions import ENTRY, WRITER, naming_newer_files, release

# Fields that configs of dense kernels do not write, so that earlier versions read them.
FACTORS = {"rank": None, "frequencies": None, "spatial_basis": "cosine"}

SpatialHead = Literal["mlp", "linear"]
PatchHead = Literal["mlp"]

# Beyond these a config is a mistake: 512 x 512 patches are a picture of 8192 x 8192 pixels.
MOST_PATCHES = 2**18
MOST_PARAMETERS = 2**48


class PartCost(NamedTuple):
    """One part's size and work: parameters, their bytes, and the multiply-adds of one image's forward pass."""

    part: str
    parameters: int
    bytes: int
    multiply_adds: int


@dataclass(frozen=True, kw_only=True)
class SPProjectorConfig:
    """The widths, grid and kernels of an `SPProjector`. Frozen, and valid once it exists.

    Sizes are in patches: an integer for a square, or a `(height, width)` pair. They are kept in canonical form (tuples; an
    integer where a kernel is square), so that equal configs compare equal.

    Args:
        vision_hidden_size: Channels `C` of the patch features.
        text_hidden_size: Width `D` of the language model.
        grid_size: The patch grid `(H, W)`.
        variant: "cropping" ("from central region to global") or "pooling" ("from abstract to specific"); section 3.2.
        kernel_sizes: One spatial token each, increasing; when cropping, of the grid's parity.
        spatial_hidden_size: Channels `S` of the spatial tokens before their head.
        detail_kernel_size: Kernel of the DetailFeatureIntegrator (section 3.3); None for a projector without one.
        detail_stride: Its stride; 2 when left out (1 along a side of one patch), None without an integrator.
        spatial_head: "mlp": the paper's two layers with GELU between; "linear": GELU + Linear, as released.
        spatial_head_bias: Whether a "linear" spatial head has a bias (the released pooling model has none).
        patch_head: "mlp": LLaVA's two layers with GELU between; None for a projector of spatial tokens alone, beside a model
            that projects its patches itself.
        rank: Channels `R` that factorized kernels see (`FactorizedFeatureExtractor`); None for dense kernels, the paper's.
        frequencies: Cosines of each side of a factorized kernel's window: one number, or one for each of `kernel_sizes`. When left
            out 3, or as many as a kernel's shorter side has patches; None for dense kernels. The detail kernel has the largest of
            them, or as many as fit.
        spatial_basis: "cosine", or "learned" for factorized kernels whose maps on the window are parameters.

    Raises:
        SpatialTokensError: If a field is of the wrong type or out of range, or two fields do not go together.

    Examples:
        >>> config = SPProjectorConfig.from_preset("llava-sp-cropping", text_hidden_size=5120)
        >>> config.num_spatial_tokens, config.num_patches, config.num_tokens
        (6, 576, 582)
        >>> SPProjectorConfig.from_json(config.to_json()) == config
        True
    """

    vision_hidden_size: int
    text_hidden_size: int
    grid_size: Size
    variant: Variant = "cropping"
    kernel_sizes: tuple[KernelSize, ...] = (4, 8, 12, 16, 20, 24)
    spatial_hidden_size: int = 512
    detail_kernel_size: KernelSize | None = 16
    detail_stride: KernelSize | None = None
    spatial_head: SpatialHead = "mlp"
    spatial_head_bias: bool = True
    patch_head: PatchHead | None = "mlp"
    rank: int | None = None
    frequencies: int | tuple[int, ...] | None = None
    spatial_basis: SpatialBasis = "cosine"

    def __post_init__(self) -> None:
        check_positive(
            vision_hidden_size=self.vision_hidden_size,
            text_hidden_size=self.text_hidden_size,
            spatial_hidden_size=self.spatial_hidden_size,
        )
        self._set("grid_size", as_size(self.grid_size, "grid_size"))
        if self.num_patches > MOST_PATCHES:
            raise SpatialTokensError(
                f"grid_size {self.grid_size} has {self.num_patches:,} patches; at most {MOST_PATCHES:,} are possible"
            )
        self._set("kernel_sizes", check_kernel_sizes(self.grid_size, self.kernel_sizes, self.variant))
        self._check_detail()
        self._check_factors()
        self._check_heads()
        if self.num_parameters > MOST_PARAMETERS:
            raise SpatialTokensError(f"this config has {self.num_parameters:,} parameters, more than any machine holds; reduce it")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_detail(self) -> None:
        if self.detail_kernel_size is None:
            if self.detail_stride is not None:
                raise SpatialTokensError(
                    f"detail_stride is {shown(self.detail_stride)} but detail_kernel_size is None (no DetailFeatureIntegrator); "
                    "give both or neither"
                )
            return
        self._set("detail_kernel_size", as_kernel_size(self.detail_kernel_size, "detail_kernel_size"))
        stride = tuple(min(2, side) for side in self.grid_size) if self.detail_stride is None else self.detail_stride
        self._set("detail_stride", as_kernel_size(stride, "detail_stride"))
        check_fits(self.grid_size, as_size(self.detail_kernel_size, "detail_kernel_size"), "detail_kernel_size")
        check_fits(self.grid_size, as_size(self.detail_stride, "detail_stride"), "detail_stride")

    def _check_factors(self) -> None:
        given = self.kernel_sizes, self.rank, self.frequencies, self.spatial_basis
        self._set("frequencies", check_factors(self.vision_hidden_size, *given))

    def _check_heads(self) -> None:
        check_choice("spatial_head", self.spatial_head, get_args(SpatialHead))
        check_choice("patch_head", self.patch_head, (*get_args(PatchHead), None))
        check_bool(spatial_head_bias=self.spatial_head_bias)
        if self.spatial_head == "mlp" and not self.spatial_head_bias:
            raise SpatialTokensError("spatial_head_bias=False needs spatial_head='linear'; the paper's MLP has biases")

    @property
    def num_spatial_tokens(self) -> int:
        """Spatial tokens `K`: one for each kernel size."""
        return len(self.kernel_sizes)

    @property
    def num_patches(self) -> int:
        """Patches `N = H * W`."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that the projector gives for an image: `K + N`, or `K` without a patch head."""
        return self.num_spatial_tokens + (self.num_patches if self.patch_head else 0)

    @property
    def detail_grid_size(self) -> Size:
        """Rows and columns of the detail map (table 6: 5 x 5 for kernel 16); (0, 0) without a DetailFeatureIntegrator."""
        if self.detail_kernel_size is None or self.detail_stride is None:
            return 0, 0
        return strided_grid_size(self.grid_size, self.detail_kernel_size, self.detail_stride)

    @property
    def any_grid(self) -> bool:
        """Whether the projector reads patches of every grid, as factorized kernels do."""
        return self.rank is not None

    @property
    def detail_frequencies(self) -> int | None:
        """Cosines of each side of the factorized detail kernel's window; None if it is dense, or there is none."""
        if self.frequencies is None or self.detail_kernel_size is None:
            return None
        return min(max(as_frequencies(self.frequencies, 1)), *as_size(self.detail_kernel_size, "detail_kernel_size"))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole projector."""
        return sum(cost.parameters for cost in self.costs())

    def costs(self, *, bytes_per_parameter: int = 2) -> tuple[PartCost, ...]:
        """Parameters, bytes and multiply-adds an image, part by part, in the order in which patches pass them.

        Nothing is allocated. Matrix products are counted; the additions of pooling, norms, softmax and GELU are not, nor what is
        done once a call: learned maps laid on the patches.

        Args:
            bytes_per_parameter: 2 for bfloat16 and float16, 4 for float32.

        Raises:
            SpatialTokensError: If bytes_per_parameter is not a positive integer.

        Examples:
            >>> SPProjectorConfig.from_preset("llava-sp-pooling").costs()[0]
            PartCost(part='extractor', parameters=763363328, bytes=1526726656, multiply_adds=763363328)
        """
        check_positive(bytes_per_parameter=bytes_per_parameter)
        counts = {**self._extractor_counts(), **self._integrator_counts(), **self._head_counts()}
        return tuple(PartCost(part, size, size * bytes_per_parameter, work) for part, (size, work) in counts.items())

    def _extractor_counts(self) -> dict[str, tuple[int, int]]:
        sizes = [as_size(size, "kernel size") for size in self.kernel_sizes]
        if self.frequencies is None:
            kernels = sum(map(prod, sizes)) * self.vision_hidden_size * self.spatial_hidden_size
            return {"extractor": (kernels, kernels)}
        numbers = as_frequencies(self.frequencies, len(sizes))
        return {"extractor": self._factorized_counts(numbers, sizes, [1] * len(sizes))}

    def _factorized_counts(self, frequencies: Sequence[int], sizes: Sequence[Size], positions: Sequence[int]) -> tuple[int, int]:
        """Parameters and multiply-adds of `FactorizedKernels`: maps, projection and cores, in the cheaper order."""
        c, r, s, n = self.vision_hidden_size, self.rank or 0, self.spatial_hidden_size, self.num_patches
        cores = sum(f * f * r * s for f in frequencies)
        learned = sum(f * f * prod(size) for f, size in zip(frequencies, sizes, strict=True)) * (self.spatial_basis == "learned")
        maps = sum(f * f * count for f, count in zip(frequencies, positions, strict=True))
        reading = min(maps * n * c + maps * c * r, n * c * r + maps * n * r)
        products = sum(f * f * r * s * count for f, count in zip(frequencies, positions, strict=True))
        return c * r + cores + learned, reading + products

    def _integrator_counts(self) -> dict[str, tuple[int, int]]:
        if self.detail_kernel_size is None:
            return {}
        s, k, p = self.spatial_hidden_size, self.num_spatial_tokens, prod(self.detail_grid_size)
        size = as_size(self.detail_kernel_size, "detail_kernel_size")
        kernel = prod(size) * self.vision_hidden_size * s
        detail_map = kernel, p * kernel
        if self.detail_frequencies is not None:
            detail_map = self._factorized_counts([self.detail_frequencies], [size], [p])
        norms_and_linears = 3 * (2 * s) + 3 * (s * s + s)
        products = (k + 2 * p) * s * s + 2 * k * p * s
        return {"integrator detail map": detail_map, "integrator attention": (norms_and_linears, products)}

    def _head_counts(self) -> dict[str, tuple[int, int]]:
        c, d, n = self.vision_hidden_size, self.text_hidden_size, self.num_patches
        s = self.spatial_hidden_size * (1 if self.detail_kernel_size is None else 2)
        layers = [s, d] if self.spatial_head == "mlp" else [s]
        spatial, spatial_biases = sum(layers) * d, len(layers) * d if self.spatial_head_bias else 0
        counts = {"spatial head": (spatial + spatial_biases, self.num_spatial_tokens * spatial)}
        if self.patch_head is not None:
            counts["patch head"] = ((c + d) * d + 2 * d, n * (c + d) * d)
        return counts

    @classmethod
    def from_preset(cls, name: str, /, **overrides: Any) -> SPProjectorConfig:
        """A named config, with fields of your own in place of some of its.

        With another `vision_hidden_size` a preset's rank stays the same share of the channels, unless you give one too.

        Raises:
            SpatialTokensError: If the name or a field is unknown (the known ones are listed), or the result is not valid.

        Examples:
            >>> SPProjectorConfig.from_preset("factorized-cropping", vision_hidden_size=1152).rank
            144
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise SpatialTokensError(f"unknown preset {shown(name)}{_did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}")
        preset, channels = dict(PRESETS[name]), overrides.get("vision_hidden_size")
        if "rank" in preset and is_positive_int(channels):
            preset["rank"] = max(1, preset["rank"] * channels // preset["vision_hidden_size"])
        return cls.from_dict({**preset, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SPProjectorConfig:
        """The config with these fields; those with a default may be left out.

        Raises:
            SpatialTokensError: If a field is unknown or missing, or the result is not valid.
        """
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise SpatialTokensError(f"an SPProjectorConfig is read from a dict of fields, got {shown(values)}")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise SpatialTokensError(f"unknown field {shown(name)}{_did_you_mean(name, known)}; known: {', '.join(known)}")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise SpatialTokensError(f"missing field {', '.join(missing)}; an SPProjectorConfig needs them")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> SPProjectorConfig:
        """Reads what `to_json` wrote.

        Raises:
            SpatialTokensError: If the text is not a JSON object, repeats a field, or its fields do not make a valid config. Names a
                newer version of the library, if one wrote it.
        """
        try:
            values = json.loads(text, object_pairs_hook=_without_repeats)
        except SpatialTokensError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise SpatialTokensError(f"the config is not valid JSON: {reason(error)}") from error
        with naming_newer_files(values):
            has_writer = isinstance(values, dict) and release(values.get(ENTRY)) != ()
            return cls.from_dict({name: value for name, value in values.items() if name != ENTRY} if has_writer else values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values; those of factorized kernels where they are not the default."""
        return {name: value for name, value in asdict(self).items() if FACTORS.get(name, ...) != value}

    def to_json(self) -> str:
        """The library's version and what `to_dict` gives, as JSON text; pairs become lists."""
        return json.dumps({ENTRY: WRITER, **self.to_dict()}, indent=2) + "\n"


def _did_you_mean(name: object, known: Any) -> str:
    close = get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise SpatialTokensError(f"the config gives {max(names, key=names.count)!r} twice; keep one")
    return values
