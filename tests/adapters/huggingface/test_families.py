"""Every family against every cell: what spatial tokens must do in a model, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn import functional

from spatial_tokens.adapters.huggingface import attach, detach, insert_placeholders, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.families import FAMILIES, GENERAL
from spatial_tokens.errors import SpatialTokensError
from tests.adapters.huggingface.exceptions import EXCEPTIONS, FAULTS
from tests.adapters.huggingface.tiny import IMAGE, MODELS, WORDS, Picture, flat, needs_known_transformers, prototype
from tests.tolerances import assert_close

pytestmark = needs_known_transformers

NEVER = [0, 1, 2, *range(100, WORDS + 1)]  # pads, ends and placeholders: a random model would write them in the middle
STEPS = 4
TOLERANCE = 1e-4
TILED = [name for name, tiny in MODELS.items() if tiny.tile_length is not None]


class Case:
    """A family's tiny model, with spatial tokens or as it was."""

    def __init__(self, name: str, *, attached: bool = True) -> None:
        self.name, self.tiny, self.attached = name, MODELS[name], attached

    def plain(self) -> Any:
        return deepcopy(prototype(self.name))

    def model(self, **options: Any) -> Any:
        model = self.plain()
        if self.attached:
            torch.manual_seed(1)
            attach(model, None, "llava-sp-cropping", **{**self.tiny.attach, **options})
        return model

    def inputs(self, model: Any, rows: list[list[Picture]], *, tiles: bool = False) -> dict[str, Any]:
        inputs = self.tiny.inputs(rows)
        if not self.attached:
            return inputs
        return insert_placeholders(model, inputs, tokens_per_image=self.tiny.tokens_per_image(rows, tiles=tiles))

    def pictures(self, *counts: int) -> list[list[Picture]]:
        """Rows with so many pictures each; rows without are left out where a family must always have one."""
        needs_one = (self.name, "text alone") in EXCEPTIONS
        return self.tiny.pictures([count for count in counts if count or not needs_one])

    def thumbnails(self, maps: list[torch.Tensor], rows: list[list[Picture]]) -> list[torch.Tensor]:
        """Of the maps of all tiles, those of the whole pictures."""
        pieces, start = [], 0
        for picture in flat(rows):
            pieces.append(maps[start : start + len(picture)])
            start += len(picture)
        assert start == len(maps)
        return [piece[self.tiny.thumbnail] for piece in pieces]


def run(name: str, cell: str, check: Callable[[Case], None]) -> None:
    """A cell; where it is known to fail, that it does."""
    prototype(name)
    fault, exception, version = FAULTS.get((name, cell)), EXCEPTIONS.get((name, cell)), Version(transformers.__version__)
    if fault is not None and Version(fault.since) <= version < Version(fault.before):
        with pytest.raises(Exception):  # noqa: B017, PT011
            check(Case(name))
        pytest.xfail(fault.why)
    if exception is None or not Version(exception.since) <= version < Version(exception.before):
        check(Case(name))
        return
    for attached in (True, False) if exception.vanilla else (True,):
        with pytest.raises(Exception):  # noqa: B017, PT011
            check(Case(name, attached=attached))


def families(*names: str) -> Any:
    return pytest.mark.parametrize("name", names or MODELS)


def language_model(model: Any) -> nn.Module:
    decoder = model.get_decoder()
    return decoder.get_encoder() if model.config.is_encoder_decoder else decoder


@contextmanager
def recorded(module: nn.Module, name: str = "") -> Iterator[list[torch.Tensor]]:
    """What a module is given: its first argument, or the one of that name."""
    found: list[torch.Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        each = kwargs.get(name, kwargs.get("encoder_hidden_states", (*args, *kwargs.values())[0]))
        if isinstance(each, torch.Tensor) and each.is_floating_point():
            found.append(each.detach())

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def run_forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the language model is given."""
    with recorded(language_model(model), "inputs_embeds") as found:
        run_forward(model, inputs)
    assert len(found) == 1
    return found[0]


def expected_tokens(case: Case, model: Any, rows: list[list[Picture]], *, tiles: bool = False) -> list[torch.Tensor]:
    """The spatial tokens of each picture (or tile), from the plain model's patches."""
    plain, tiny = case.plain(), case.tiny
    with recorded(plain.base_model.get_submodule(tiny.tap)) as captured:
        run_forward(plain, tiny.inputs(rows))
    maps = tiny.maps(plain, captured, flat(rows), tiny.cell)
    maps = maps if tiles else case.thumbnails(maps, rows)
    grid = model.spatial_tokens.config.grid_size
    if model._spatial_attachment.resize is None and model.spatial_tokens.any_grid:
        with torch.no_grad():
            return [model.spatial_tokens(each.flatten(0, 1)[None], tuple(each.shape[:2]))[0] for each in maps]
    if tiny.attach.get("resize") == "pool":
        maps = [functional.adaptive_avg_pool2d(each.movedim(-1, 0), grid).movedim(0, -1) for each in maps]
    assert all(tuple(each.shape[:2]) == grid for each in maps)
    with torch.no_grad():
        return list(model.spatial_tokens(torch.stack([each.flatten(0, 1) for each in maps])))


def check_own_places(case: Case, *, tiles: bool, **options: Any) -> None:
    rows, model = case.pictures(2, 1, 0), case.model(unit="tile" if tiles else "image", **options)
    plain, inputs = case.tiny.inputs(rows), case.inputs(model, rows, tiles=tiles)
    before, after = embeddings(case.plain(), plain), embeddings(model, inputs)
    real, slots = inputs["attention_mask"] == 1, inputs["input_ids"] == model._spatial_attachment.token_id
    torch.testing.assert_close(after[real & ~slots], before[plain["attention_mask"] == 1], rtol=0, atol=0)
    assert_close(after[slots], torch.cat(expected_tokens(case, model, rows, tiles=tiles)))
    count = model.spatial_tokens.config.num_spatial_tokens
    assert_slots_come_first(case, inputs, slots, rows, count=count, tiles=tiles)


def assert_slots_come_first(
    case: Case, inputs: dict[str, Any], slots: torch.Tensor, rows: list[list[Picture]], *, count: int, tiles: bool
) -> None:
    """In every row: the slots of a picture (or tile), then its image tokens."""
    for row, ids, mask in zip(rows, inputs["input_ids"].tolist(), slots.tolist(), strict=True):
        kinds = ["slot" if slot else "image" for token, slot in zip(ids, mask, strict=True) if slot or token == IMAGE]
        expected = []
        for picture in row:
            length, cuts = case.tiny.ids(picture).count(IMAGE), len(picture)
            if not tiles:
                expected += ["slot"] * count + ["image"] * length
            elif case.tiny.tile_length:
                expected += (["slot"] * count + ["image"] * case.tiny.tile_length) * cuts
            else:  # the tiles' tokens are woven into lines
                expected += ["slot"] * count * cuts + ["image"] * length
        assert kinds == expected


@families()
def test_placement(name):
    run(name, "placement", lambda case: check_own_places(case, tiles=False))


@families(*(name for name, tiny in MODELS.items() if tiny.attach.get("resize")))
def test_factorized_kernels_read_pictures_of_every_size(name):
    def check(case: Case) -> None:
        check_own_places(
            case, tiles=False, resize=None, rank=4, frequencies=1 if case.tiny.attach["detail_kernel_size"] == 1 else 2
        )

    run(name, "placement", check)


@families(*TILED)
def test_a_place_for_every_tile(name):
    run(name, "tiles", lambda case: check_own_places(case, tiles=True))


def rides_among_image_tokens(name: str) -> bool:
    return FAMILIES.get(MODELS[name].family, GENERAL).image_mode


@families()
def test_among_image_tokens(name):
    if rides_among_image_tokens(name):
        run(name, "image mode", check_among_image_tokens)
        return
    with pytest.raises(SpatialTokensError, match="use mode='own'"):
        Case(name).model(mode="image")


def check_among_image_tokens(case: Case) -> None:
    tiles = bool(case.tiny.tile_length)  # then image tokens come tile by tile
    unit = "tile" if tiles else "image"
    rows, model = case.pictures(2, 1, 0), case.model(mode="image", unit=unit)
    plain, inputs = case.tiny.inputs(rows), case.inputs(model, rows, tiles=tiles)
    before, after = embeddings(case.plain(), plain), embeddings(model, inputs)
    was, now = plain["input_ids"] == IMAGE, inputs["input_ids"] == IMAGE
    torch.testing.assert_close(
        after[~now & (inputs["attention_mask"] == 1)], before[~was & (plain["attention_mask"] == 1)], rtol=0, atol=0
    )
    own = before[was].split(case.tiny.tokens_per_image(rows, tiles=tiles))
    spatial = expected_tokens(case, model, rows, tiles=tiles)
    assert_close(after[now], torch.cat([torch.cat(pair) for pair in zip(spatial, own, strict=True)]))
    check_generate(case, tiles=tiles, mode="image", unit=unit)


@contextmanager
def patch_by_patch(model: nn.Module) -> Iterator[None]:
    """What is computed for a patch depends on it alone: attention gives nothing, convolutions look at no neighbor."""

    def nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    handles = []
    for module in model.base_model.modules():
        kind = type(module).__name__
        if "Attention" in kind and not any("Attention" in type(child).__name__ for child in module.children()):
            handles.append(module.register_forward_hook(nothing))
        elif kind in ("SqueezeExcite", "SEModule"):
            handles.append(module.register_forward_hook(lambda module, args, output: args[0]))
        elif isinstance(module, nn.Conv2d):
            keep_own_pixels(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_own_pixels(layer: nn.Conv2d) -> None:
    """Zeros all of a kernel but the square of its stride."""
    own = torch.zeros(layer.kernel_size)
    top, left = (0, 0) if isinstance(layer.padding, str) else layer.padding
    if type(layer).__name__ == "Conv2dSame":  # it pads by itself
        top, left = ((kernel - stride) // 2 for kernel, stride in zip(layer.kernel_size, layer.stride, strict=True))
    own[top : top + layer.stride[0], left : left + layer.stride[1]] = 1
    with torch.no_grad():
        layer.weight *= own


def with_cells_changed(picture: Picture, tile: int, cells: torch.Tensor, size: int) -> Picture:
    """The picture with other pixels in these cells `(H, W)` of a tile."""
    pixels = cells.repeat_interleave(size, 0).repeat_interleave(size, 1)
    changed = picture.clone()
    changed[tile][:, pixels] = 1.5 - changed[tile][:, pixels]
    return changed


def check_raster_order(case: Case) -> None:
    tiny = case.tiny
    for shape in {*tiny.shapes, *tiny.raster_shapes}:
        picture = torch.rand(shape[0], 3, *shape[1:]) + 0.01
        grid = tiny.grid(picture)
        model = case.model(grid_size=grid, kernel_sizes=(grid,), detail_kernel_size=None, detail_stride=None, resize=None)

        def patches(picture: Picture, model: Any = model, grid: tuple[int, int] = grid) -> torch.Tensor:
            with recorded(model.spatial_tokens) as found, patch_by_patch(model):
                run_forward(model, case.inputs(model, [[picture]]))
            return found[0][0].unflatten(0, grid)

        before = patches(picture)
        for cells in patterns(grid, tiny.together):
            change = (patches(with_cells_changed(picture, tiny.thumbnail, cells, tiny.cell)) - before).abs().amax(-1)
            assert torch.equal(change > 1e-6 * before.abs().max(), cells)
        if len(picture) > 1:
            others = range(len(picture))[1:] if tiny.thumbnail == 0 else range(len(picture))[:-1]
            for tile in others:
                assert torch.equal(
                    patches(with_cells_changed(picture, tile, torch.ones(grid, dtype=torch.bool), tiny.cell)), before
                )


def patterns(grid: tuple[int, int], together: int) -> list[torch.Tensor]:
    """Sets of cells that tell every cell from every other: those with a bit in their number set."""
    height, width = grid[0] // together, grid[1] // together
    numbers = torch.arange(height * width).unflatten(0, (height, width))
    numbers = numbers.repeat_interleave(together, 0).repeat_interleave(together, 1)
    return [(numbers >> bit) % 2 == 1 for bit in range((height * width - 1).bit_length())]


@families()
def test_raster_order(name):
    run(name, "raster order", check_raster_order)


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), torch.arange(logits[..., 0].numel()) % 90 + 3)


def check_gradients(case: Case) -> None:
    rows, model = case.pictures(2, 1, 0), case.model().train()
    loss_of(model, case.inputs(model, rows)).backward()
    for key, weight in model.spatial_tokens.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        if not key.endswith(("key_projector.0.bias", "key_projector.1.bias")):  # softmax does not see a shift of all scores
            assert weight.grad.any(), key


@families()
def test_gradients_reach_every_parameter(name):
    run(name, "gradients", check_gradients)


def check_text_alone(case: Case) -> None:
    model, inputs = case.model(), case.tiny.inputs([[]])
    given = run_forward(model, inputs)
    assert torch.equal(given[..., :WORDS], run_forward(case.plain(), inputs))
    if case.attached:
        loss_of(model.train(), inputs).backward()
        assert all(weight.grad is not None and not weight.grad.any() for weight in model.spatial_tokens.parameters())


@families()
def test_text_alone(name):
    run(name, "text alone", check_text_alone)


def check_batch(case: Case) -> None:
    rows, model = case.pictures(2, 1, 0), case.model()
    inputs = case.inputs(model, rows)
    together = run_forward(model, inputs)
    for number, row in enumerate(rows):
        alone = run_forward(model, case.inputs(model, [row]))[0]
        mine = together[number] if model.config.is_encoder_decoder else together[number][inputs["attention_mask"][number] == 1]
        torch.testing.assert_close(mine, alone, rtol=TOLERANCE, atol=TOLERANCE)


@families()
def test_a_batch_equals_its_rows(name):
    run(name, "batch", check_batch)


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """The tokens generated, without the prompt."""
    given = {key: each for key, each in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": NEVER, **options}
    with torch.no_grad():
        return model.generate(**given, **options)[:, -STEPS:]


def loop(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The same, greedily and without a cache."""
    inputs, generated = dict(inputs), []
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
    for _ in range(STEPS):
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, [token for token in NEVER if token < logits.shape[-1]]] = -torch.inf
        generated.append(logits.argmax(-1, keepdim=True))
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.cat([inputs["decoder_input_ids"], generated[-1]], dim=1)
            continue
        grown = {"input_ids": generated[-1], "attention_mask": torch.ones_like(generated[-1])}
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                grown[key] = torch.zeros_like(generated[-1])
        inputs |= {key: torch.cat([inputs[key], each], dim=1) for key, each in grown.items()}
    return torch.cat(generated, dim=1)


def check_generate(case: Case, *, tiles: bool = False, **options: Any) -> None:
    rows, model = case.pictures(2), case.model(**options)
    inputs = case.inputs(model, rows, tiles=tiles)
    assert torch.equal(generate(model, inputs), loop(model, inputs))


@families()
def test_generate_equals_a_loop_without_a_cache(name):
    run(name, "generate", check_generate)


def check_beams(case: Case) -> None:
    rows, model = case.pictures(2, 1, 0), case.model()
    beams = {"num_beams": 2, "num_return_sequences": 2}
    together = generate(model, case.inputs(model, rows), **beams)
    alone = [generate(model, case.inputs(model, [row]), **beams) for row in rows]
    assert torch.equal(together, torch.cat(alone))


@families()
def test_beams_equal_those_of_single_rows(name):
    run(name, "beams", check_beams)


def check_never_generated(case: Case) -> None:
    rows, model = case.pictures(1), case.model()
    inputs, token_id = case.inputs(model, rows), model._spatial_attachment.token_id
    others = [token for token in NEVER if token != token_id]
    if run_forward(model, inputs).shape[-1] <= token_id:
        return  # the head has no row for it

    def favor(module: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([token_id]), 1e4)

    head = model.get_output_embeddings()
    hook = head.register_forward_hook(favor)
    assert (generate(model, inputs, suppress_tokens=others) == token_id).all()  # it would be, were it not for attach()
    hook.remove()
    head.register_forward_hook(favor, prepend=True)
    with torch.no_grad():
        given = {key: each for key, each in inputs.items() if key != "decoder_input_ids"}
        assert not (model.generate(**given, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:] == token_id).any()


@families()
def test_the_spatial_token_is_never_generated(name):
    run(name, "never generated", check_never_generated)


def check_saved(case: Case, folder: Any) -> None:
    rows, model = case.pictures(2), case.model()
    inputs = case.inputs(model, rows)
    save_adapter(model, folder)
    loaded, _ = load_adapter(case.plain(), folder)
    assert torch.equal(run_forward(loaded, inputs), run_forward(model, inputs))


@families()
def test_saved_and_loaded(name, tmp_path):
    run(name, "save and load", lambda case: check_saved(case, tmp_path))


def traces(model: nn.Module) -> dict[str, Any]:
    """What could be left in a module: its attributes' names, its class and the number of its hooks."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            [len(each) for key, each in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def check_detached(case: Case) -> None:
    rows, model = case.pictures(2, 1), case.plain()
    inputs, untouched = case.tiny.inputs(rows), case.plain()
    attach(model, None, "llava-sp-cropping", **case.tiny.attach)
    run_forward(model, case.inputs(model, rows))
    expected = run_forward(untouched, inputs)
    assert detach(model) is model
    assert torch.equal(run_forward(model, inputs), expected)
    assert traces(model) == traces(untouched)
    assert model.config.to_dict() == untouched.config.to_dict()
    assert model.generation_config.to_dict() == untouched.generation_config.to_dict()
    weights = model.state_dict()
    assert weights.keys() == untouched.state_dict().keys()
    assert all(torch.equal(weights[key], each) for key, each in untouched.state_dict().items())


@families()
def test_detached_it_is_as_it_was(name):
    run(name, "detach", check_detached)


def check_deep_copy(case: Case) -> None:
    rows, model = case.pictures(2), case.model()
    inputs = case.inputs(model, rows)
    before, twin = run_forward(model, inputs), deepcopy(model)
    assert torch.equal(run_forward(twin, inputs), before)
    places = {weight.data_ptr() for weight in model.parameters() if weight.numel()}
    assert not any(weight.data_ptr() in places for weight in twin.parameters() if weight.numel())
    with torch.no_grad():
        for weight in twin.spatial_tokens.parameters():
            weight.add_(1)
    assert not torch.equal(run_forward(twin, inputs), before)
    assert torch.equal(run_forward(model, inputs), before)
    changed = run_forward(twin, inputs)
    detach(model)
    assert torch.equal(run_forward(twin, inputs), changed)


@families()
def test_a_deep_copy_is_independent(name):
    run(name, "deep copy", check_deep_copy)


def check_checkpointing(case: Case) -> None:
    rows, found = case.pictures(2, 1), []
    for checkpointing in (False, True):
        model = case.model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        loss_of(model, case.inputs(model, rows)).backward()
        found.append([weight.grad for weight in model.spatial_tokens.parameters()])
    for without, with_checkpoints in zip(*found, strict=True):
        assert_close(with_checkpoints, without)


@families()
def test_checkpointed_gradients_are_equal(name):
    run(name, "checkpointing", check_checkpointing)


def test_step3p7_with_local_tiles_is_refused():
    prototype("step3p7")
    case = Case("step3p7")
    rows, model = case.pictures(1), case.model()
    inputs = case.tiny.inputs(rows)
    row, start = inputs["input_ids"][0], inputs["input_ids"][0].tolist().index(IMAGE)
    inputs["input_ids"] = torch.cat([row[:start], row.new_full((16,), IMAGE), row[start:]])[None]
    del inputs["attention_mask"]
    local = {"pixel_values_local": inputs["pixel_values"], "num_local_patches": [1]}
    run_forward(case.plain(), {**inputs, **local})
    with pytest.raises(SpatialTokensError, match="but 2 were encoded"):
        run_forward(model, {**insert_placeholders(model, inputs, tokens_per_image=32), **local})
