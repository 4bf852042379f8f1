"""`probe`: what an encoder's patches tell of their places, by linear readers that are tested on other pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from spatial_tokens.checks import check_seed
from spatial_tokens.compression.encoded import pictures_in
from spatial_tokens.diagnostics.encoders import PictureEncoder, picture_encoder
from spatial_tokens.diagnostics.intervals import Estimate, bootstrap, ratios
from spatial_tokens.diagnostics.readers import SECTIONS, Moments, Reader, coordinates, fit, right_order, sections, targets_of
from spatial_tokens.diagnostics.report import Layer, ProbeReport, Reading, Shares
from spatial_tokens.diagnostics.shifts import Shift, drawn_shift, generated, prepared, require_image
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.grid import KernelSize, Size, check_positive
from spatial_tokens.pictures import read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 400
PARTS = 4  # of each four pictures two are learned from, one chooses the ridge, one is tested on
WITH_PLACES = "with places"

Progress = Callable[[str, int], None]
Pictures = str | PathLike[str] | Sequence[Any]
Maps = list[torch.Tensor]


def probe(
    encoder: Any,
    pictures: Pictures | None = None,
    *,
    processor: Any = None,
    image_size: KernelSize | None = None,
    layer: int | None = None,
    limit: int = LIMIT,
    random_weights: bool = False,
    seed: int = 0,
    device: Any = None,
    progress: Progress = lambda stage, pictures: None,
) -> ProbeReport:
    """Reads patches' places from their features, layer by layer: would spatial tokens tell a language model anything new?

    Linear readers are fitted to half of the pictures by ridge regression in closed form, their ridge is chosen on a quarter, and
    they are tested on the last quarter. Pictures are encoded batch by batch, and no features are kept.

    Args:
        encoder: The name of a timm model, also as `timm/NAME`; the folder or hub repository of a vision model or a
            vision-language model of transformers; such a vision-language model; or a callable from pixels `(B, 3, h, w)`, 0 to 1,
            to maps of features `(B, H, W, C)`, or a dict of maps by layer.
        pictures: A folder; or paths and PIL images. None: generated ones, whose content says nothing of places.
        processor: A vision-language model's.
        image_size: Height and width in pixels: of a callable; of a timm model, in place of its own.
        layer: Of a vision encoder, the hidden state that a projector reads (the paper's, -2, when left out).
        limit: At most so many pictures; of a larger folder, evenly spread ones.
        random_weights: Whether a timm model keeps its random weights, drawn from `seed`, and loads none.
        seed: Of the shifts, the resamples, generated pictures and random weights.
        device: Where to compute; where the model is, or the CPU, when left out.
        progress: Told what pictures are read for, and how many have been.

    Raises:
        MissingExtraError: If the library that the encoder needs is not installed.
        SpatialTokensError: If there are fewer than four pictures, one cannot be read, or the encoder cannot be loaded, gives no
            grid of patches, or gives NaN or infinity.

    Example:
        >>> encode = lambda pixels: torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)   # colors alone
        >>> report = probe(encode, image_size=96, limit=40)
        >>> report.main.column.r2.value < 0.1
        True
    """
    check_positive(limit=limit)
    check_seed(seed)
    sources = _sources(pictures, limit, seed)
    reads = picture_encoder(
        encoder, processor=processor, image_size=image_size, layer=layer, random_weights=random_weights, seed=seed, device=device
    )
    with torch.inference_mode():
        readers, main = _learn(reads, sources, progress)
        tests = _test(reads, readers, main, sources, seed, progress)
    layers = [_layer(name, test, seed) for name, test in tests.items()]
    embedded = layers.pop()
    return ProbeReport(
        encoder=reads.name,
        random_weights=random_weights,
        pictures=len(sources),
        fitted=sum(number % PARTS < PARTS - 2 for number in range(len(sources))),
        tested=len(sources) // PARTS,
        generated=pictures is None,
        layer=main,
        layers=layers,
        with_places=embedded,
    )


def _sources(pictures: Pictures | None, limit: int, seed: int) -> list[Callable[[], Image]]:
    """What gives each picture."""
    if pictures is None:
        found: list[Callable[[], Image]] = [lambda number=number: generated(number, seed) for number in range(limit)]  # type: ignore[misc]
    elif isinstance(pictures, (str, PathLike)):
        found = [lambda path=path: read_picture(path) for path in pictures_in(fspath(pictures), limit)]  # type: ignore[misc]
    else:
        found = [lambda each=each: _opened(each) for each in list(pictures)[:limit]]  # type: ignore[misc]
    if len(found) < PARTS:
        raise SpatialTokensError(
            f"got {len(found)} pictures; give at least {PARTS}, and better some hundred: readers are tested on pictures that they "
            "were not fitted to"
        )
    return found


def _opened(picture: Any) -> Image:
    if isinstance(picture, (str, PathLike)):
        return read_picture(picture)
    require_image(picture)
    return picture.convert("RGB")  # type: ignore[no-any-return]


def _learn(reads: PictureEncoder, sources: list[Callable[[], Image]], progress: Progress) -> tuple[dict[str, Any], str]:
    """Readers of each layer, and the name of the one that a projector reads."""
    sums: dict[str, _ReaderFit] = {}
    known, main = [i for i in range(len(sources)) if i % PARTS != PARTS - 1], reads.layer
    for numbers, images in _batches(reads, sources, known):
        found = _encoded(reads, images, numbers)
        main = main or list(found)[-1]
        for name, maps in _with_embedding(found, main, sums).items():
            for number, each in zip(numbers, maps, strict=True):
                sums[name].add(each, part=number % PARTS)
        progress("learn", known.index(numbers[-1]) + 1)
    return {name: (each.fit(), each.embedding) for name, each in sums.items()}, main


def _with_embedding(found: dict[str, Maps], main: str, sums: dict[str, _ReaderFit]) -> dict[str, Maps]:
    """All layers' maps, and the main one's once more, for an embedding of place to be added; the first batch tells its size."""
    found = {**found, WITH_PLACES: found[main]}
    if not sums:
        deviation = torch.cat([each.flatten(0, 1) for each in found[main]]).double().std(0).square().mean().sqrt().item()
        sums |= {name: _ReaderFit() for name in found}
        sums[WITH_PLACES].embedding = deviation or 1.0
    return found


class _ReaderFit:
    """What is known of a layer's features: of patches anywhere, and of patches beside those of the same picture."""

    def __init__(self) -> None:
        self.embedding = 0.0
        self.anywhere = Moments(), Moments(), Moments()  # of both halves of those learned from, and to choose the ridge
        self.within = Moments(), Moments()  # of those learned from, and to choose the ridge

    def add(self, features: torch.Tensor, *, part: int) -> None:
        """Adds a picture's map `(H, W, C)`."""
        rows = _rows(features, self.embedding)
        places = coordinates((features.shape[0], features.shape[1]), rows.device)
        self.anywhere[part].add(rows, targets_of(places))
        self.within[part == PARTS - 2].add(rows - rows.mean(0), places)

    def fit(self) -> tuple[Reader, Reader, Reader]:
        """A reader of places, one fitted to half as many pictures, and one of which of two patches is further.

        Least squares on the differences of all pairs of a picture's patches are those on differences from the picture's mean.
        """
        half, other_half, held_out = self.anywhere
        return fit(half.merged(other_half), held_out), fit(half, held_out), fit(*self.within)


def _test(
    reads: PictureEncoder, readers: dict[str, Any], main: str, sources: list[Callable[[], Image]], seed: int, progress: Progress
) -> dict[str, _ReaderTest]:
    """What each layer's readers get right in pictures that they have not seen, and what their readings follow in shifted ones."""
    tests = {name: _ReaderTest(*reader) for name, reader in readers.items()}
    asked = list(range(PARTS - 1, len(sources), PARTS))
    for numbers, images in _batches(reads, sources, asked):
        plain = _encoded(reads, images, numbers)
        for name, test in tests.items():
            for each in plain[main if name == WITH_PLACES else name]:
                test.add(each)
        for kind in ("roll", "crop"):
            grids = [(each.shape[0], each.shape[1]) for each in plain[main]]
            shifts = [drawn_shift(kind, grid, Random(f"{seed} {n} {kind}")) for n, grid in zip(numbers, grids, strict=True)]
            moved = _encoded(reads, [shift(image) for shift, image in zip(shifts, images, strict=True)], numbers)
            for name, maps in moved.items():
                for shift, each in zip(shifts, maps, strict=True):
                    tests[name].add_shifted(each, shift)
        progress("test", asked.index(numbers[-1]) + 1)
    return tests


class _ReaderTest:
    """What a layer's readers say of pictures that they have not seen; each picture's sums."""

    def __init__(self, readers: tuple[Reader, Reader, Reader], embedding: float) -> None:
        self.anywhere, self.from_half, self.within = readers
        self.embedding = embedding
        self.sums: list[torch.Tensor] = []  # (2, 8) each: of column and row, what `Reading` is the ratios of
        self.followed: dict[str, list[torch.Tensor]] = {
            "roll": [],
            "crop": [],
        }  # (2, 16) each: products of 1, slot, origin, reading
        self.grids: set[Size] = set()
        self.there = torch.zeros(2, SECTIONS, dtype=torch.float64)  # patches in each twelfth, by column and row
        self.channels = 0

    def add(self, features: torch.Tensor) -> None:
        """Reads a picture's map `(H, W, C)`."""
        grid, self.channels = (features.shape[0], features.shape[1]), features.shape[2]
        self.grids.add(grid)
        rows = _rows(features, self.embedding)
        places = coordinates(grid, rows.device)
        read = self.anywhere(rows)
        missed = (read[:, :2] - places).square().sum(0)
        where = sections(places)
        self.there += torch.stack([torch.bincount(each, minlength=SECTIONS) for each in where.cpu().unbind(1)])
        right, right_from_half = (_right(each, where) for each in (read, self.from_half(rows)))
        ordered, pairs = right_order(self.within(rows), places)
        every = torch.full_like(right, len(rows))
        self.sums.append(
            torch.stack([missed, places.square().sum(0), right, every, right - right_from_half, every, ordered, pairs], dim=1)
        )

    def add_shifted(self, features: torch.Tensor, shift: Shift) -> None:
        """Reads the map of a shifted picture."""
        rows = _rows(features, 0.0)
        places = coordinates((features.shape[0], features.shape[1]), rows.device)
        told = torch.stack([torch.ones_like(places), places, shift.origins(places), self.anywhere(rows)[:, :2]], dim=-1)
        self.followed[shift.kind].append(torch.einsum("nai, naj -> aij", told, told).flatten(1))


def _right(read: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """How many of the readings `(n, 2 + 2 * SECTIONS)` name the right twelfth `(n, 2)`, by column and row."""
    told = torch.unflatten(read[:, 2:], 1, (2, -1)).argmax(-1)
    return (told == where).sum(0).double()


def _layer(name: str, test: _ReaderTest, seed: int) -> Layer:
    sums = torch.stack(test.sums).cpu()
    readings = []
    for axis in range(2):
        missed, right, gain, order = bootstrap(sums[:, axis], ratios, seed=seed)
        r2 = Estimate(1 - missed.value, *(None if each is None else 1 - each for each in (missed.high, missed.low)))
        follows = (
            _shares([torch.stack(test.followed[kind])[:, axis] for kind in ("roll", "crop")], seed)
            if test.followed["roll"]
            else None
        )
        chance = (test.there[axis].max() / test.there[axis].sum()).item()
        readings.append(Reading(r2, right, gain, chance, order, follows))
    grid = next(iter(test.grids)) if len(test.grids) == 1 else None
    return Layer(name, grid, test.channels, *readings)


def _shares(products: list[torch.Tensor], seed: int) -> Shares | None:
    """How far readings follow slots, the picture's border, and content; None where there is only one picture."""

    def shares(sums: torch.Tensor) -> torch.Tensor:
        roll, crop = (_slopes(each) for each in torch.unflatten(sums, 1, (2, 4, 4)).unbind(1))
        return torch.stack([roll[:, 0], roll[:, 1] - crop[:, 1], crop[:, 1]], dim=1)

    if len(products[0]) < 2:
        return None
    return Shares(*bootstrap(torch.cat(products, dim=1), shares, seed=seed))


def _slopes(products: torch.Tensor) -> torch.Tensor:
    """Of readings on slots and origins, by least squares, `(n, 2)`."""
    inputs, with_reading = products[:, :3, :3], products[:, :3, 3:]
    slopes: torch.Tensor = torch.linalg.pinv(inputs, hermitian=True, rtol=1e-9) @ with_reading
    return slopes[:, 1:, 0]


def _batches(
    reads: PictureEncoder, sources: list[Callable[[], Image]], chosen: Sequence[int]
) -> Iterator[tuple[list[int], list[Image]]]:
    """The numbers of pictures, and these in the encoder's size."""
    for start in range(0, len(chosen), reads.at_once):
        numbers = list(chosen[start : start + reads.at_once])
        yield numbers, [prepared(sources[number](), reads.size) for number in numbers]


def _encoded(reads: PictureEncoder, images: Sequence[Image], numbers: Sequence[int]) -> dict[str, Maps]:
    """Maps by layer.

    Raises:
        SpatialTokensError: If a map is too small to have places, or holds NaN or infinity.
    """
    found = reads.encode(images)
    for name, maps in found.items():
        for number, each in zip(numbers, maps, strict=True):
            if min(each.shape[:2]) < 2:
                raise SpatialTokensError(
                    f"layer {name} of {reads.name} gives {each.shape[0]} x {each.shape[1]} patches of a picture; to read places it "
                    "takes 2 x 2 at least; give a larger image_size, or another encoder"
                )
            if not bool(each.isfinite().all()):
                raise SpatialTokensError(
                    f"layer {name} of {reads.name} gives NaN or infinity for picture {number}, counted from 0; look at its weights "
                    "and dtype"
                )
    if reads.layer and reads.layer not in found:
        raise SpatialTokensError(f"{reads.name} gives no layer {shown(reads.layer)}; it gives {', '.join(found)}")
    return found


def _rows(features: torch.Tensor, embedding: float) -> torch.Tensor:
    """A map `(H, W, C)` as rows `(H * W, C)` in float64, with an embedding of that size added."""
    rows = features.flatten(0, 1).double()
    if not embedding:
        return rows
    return rows + embedding * sine_cosine((features.shape[0], features.shape[1]), features.shape[2], rows.device)


def sine_cosine(grid: Size, channels: int, device: Any = None) -> torch.Tensor:
    """The usual embedding of places in two dimensions, `(H * W, channels)`, of size 1 in the root of the mean square."""
    quarter = -(-channels // 4)
    rates = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    across, down = torch.meshgrid(*(torch.arange(side, dtype=torch.float64, device=device) for side in grid[::-1]), indexing="xy")
    angles = torch.stack([across, down], dim=-1).reshape(-1, 2, 1) * rates
    return 2**0.5 * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :channels]
