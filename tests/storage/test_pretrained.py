import os
import re
import resource
import stat
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.storage import files

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
SMALL = SPProjectorConfig(
    vision_hidden_size=5, text_hidden_size=7, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=3, detail_kernel_size=4
)
CONFIGS = {
    "cropping": SMALL,
    "linear": SPProjectorConfig(**{**SMALL.to_dict(), "spatial_head": "linear"}),
    "pooling": SPProjectorConfig(
        **{**SMALL.to_dict(), "variant": "pooling", "detail_kernel_size": None, "detail_stride": None, "spatial_head": "linear"},
    ),
    "rectangular": SPProjectorConfig(
        **{**SMALL.to_dict(), "grid_size": (6, 9), "kernel_sizes": ((2, 3), (6, 7)), "detail_stride": (1, 3)}
    ),
}  # fmt: skip
NO_SPACE = OSError(28, "No space left on device")


def build(config=SMALL, **kwargs):
    return SPProjector.from_config(config, **kwargs)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name, dtype):
    projector = build(CONFIGS[name], dtype=dtype)
    projector.save_pretrained(tmp_path / "new" / "folder")
    loaded = SPProjector.from_pretrained(str(tmp_path / "new" / "folder"))
    assert loaded.config == CONFIGS[name]
    same(loaded.state_dict(), projector.state_dict())
    patches = torch.randn(2, loaded.config.num_patches, 5, dtype=dtype)
    same(loaded(patches), projector(patches))


def test_nan_stays_nan(tmp_path):
    projector = build()
    with torch.no_grad():
        projector.patch_head.fc1.bias[2] = float("nan")
    projector.save_pretrained(tmp_path)
    same(SPProjector.from_pretrained(tmp_path).state_dict(), projector.state_dict())


def test_the_files_are_what_anyone_can_read(tmp_path):
    projector = build()
    projector.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert SPProjectorConfig.from_json((tmp_path / "config.json").read_text()) == SMALL
    same(load_file(tmp_path / "model.safetensors"), dict(projector.state_dict()))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_device_can_be_chosen(tmp_path, dtype):
    projector = build()
    projector.save_pretrained(tmp_path)
    same(SPProjector.from_pretrained(tmp_path, dtype=dtype, device="cpu").state_dict(), projector.to(dtype).state_dict())
    on_meta = SPProjector.from_pretrained(tmp_path, device="meta", dtype=dtype)
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", dtype)}


def test_a_loaded_projector_can_be_trained_and_saved_in_its_place(tmp_path):
    build().save_pretrained(tmp_path)
    projector = SPProjector.from_pretrained(tmp_path)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in projector.parameters())
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.1)
    projector(torch.randn(2, 64, 5)).square().mean().backward()
    optimizer.step()
    assert not any(
        torch.equal(tensor, before[name]) for name, tensor in projector.state_dict().items() if "key_projector.1.bias" not in name
    )
    same(SPProjector.from_pretrained(tmp_path).state_dict(), before)
    projector.save_pretrained(tmp_path)
    same(SPProjector.from_pretrained(tmp_path).state_dict(), projector.state_dict())


def test_a_later_save_replaces_the_earlier(tmp_path):
    build().save_pretrained(tmp_path)
    other = build(CONFIGS["pooling"])
    other.save_pretrained(tmp_path)
    loaded = SPProjector.from_pretrained(tmp_path)
    assert loaded.config == CONFIGS["pooling"]
    same(loaded.state_dict(), other.state_dict())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_any_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        build().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def half_a_file(tensors, path, metadata=None):
    path.write_bytes(b"half")
    raise NO_SPACE


def renames(*, failing):
    """`os.replace`, of which one call fails."""
    calls = iter(range(100))

    def replace(*paths, rename=os.replace):
        if next(calls) == failing:
            raise NO_SPACE
        rename(*paths)

    return replace


@contextmanager
def short_files():
    """No file may grow over a page."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAILURES = {
    "half a file": lambda: patch.object(files, "save_file", half_a_file),
    "short files": short_files,
    "rename": lambda: patch.object(os, "replace", renames(failing=0)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_save_leaves_the_checkpoint_before_it(tmp_path, failure):
    first = build()
    first.save_pretrained(tmp_path)
    names = contents(tmp_path).keys()
    second = build(SPProjectorConfig(**{**SMALL.to_dict(), "variant": "pooling"}))  # the same names and shapes
    with FAILURES[failure](), pytest.raises(SpatialTokensError, match=r"cannot write .*: .*(No space left|File too large)"):
        second.save_pretrained(tmp_path)
    assert contents(tmp_path).keys() == names
    loaded = SPProjector.from_pretrained(tmp_path)
    assert loaded.config == SMALL
    same(loaded.state_dict(), first.state_dict())


def test_a_save_cut_between_its_two_files_is_the_new_one(tmp_path):
    first, second = build(), build(SPProjectorConfig(**{**SMALL.to_dict(), "variant": "pooling"}))
    first.save_pretrained(tmp_path)
    with patch.object(os, "replace", renames(failing=1)), pytest.raises(SpatialTokensError, match="cannot write "):
        second.save_pretrained(tmp_path)
    said = r"config\.json is not the config that model\.safetensors was saved with .* saving again rewrites config\.json"
    with pytest.warns(UserWarning, match=said):
        loaded = SPProjector.from_pretrained(tmp_path)
    assert loaded.config == second.config
    same(loaded.state_dict(), second.state_dict())
    loaded.save_pretrained(tmp_path)
    assert SPProjectorConfig.from_json((tmp_path / "config.json").read_text()) == second.config
    same(SPProjector.from_pretrained(tmp_path).state_dict(), second.state_dict())  # without a warning


def test_a_damaged_copy_of_the_config(tmp_path):
    projector = build()
    projector.save_pretrained(tmp_path)
    save_file(projector.state_dict(), tmp_path / "model.safetensors", {"config": "{"})
    with pytest.raises(SpatialTokensError, match=r"config in the metadata of .*model\.safetensors: the config is not valid JSON"):
        SPProjector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        ("patch_head.fc1.weight.absmax", "4-bit weights of bitsandbytes"),
        ("patch_head.fc1.weight.quant_state.bitsandbytes__nf4", "4-bit weights of bitsandbytes"),
        ("patch_head.fc1.SCB", "8-bit weights of bitsandbytes"),
        ("patch_head.fc1.qweight", "packed weights of GPTQ or AWQ"),
        ("patch_head.fc1.weight_packed", "quantized weights of compressed-tensors"),
        (None, "4-bit weights of bitsandbytes"),
    ],
)
def test_quantized_weights_are_named(tmp_path, added, kind):
    projector = build()
    projector.save_pretrained(tmp_path)
    name = added or "patch_head.fc1.weight"
    save_file({**projector.state_dict(), name: torch.ones(18, 1, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    said = rf"holds {kind} \({re.escape(name)}\); use the checkpoint before quantization, or dequantize it and save it again"
    with pytest.raises(SpatialTokensError, match=said):
        SPProjector.from_pretrained(tmp_path)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_first_save_leaves_nothing_that_loads(tmp_path, failure):
    with FAILURES[failure](), pytest.raises(SpatialTokensError, match=r"cannot write "):
        build().save_pretrained(tmp_path)
    assert not any(name.endswith(".tmp") for name in os.listdir(tmp_path))
    with pytest.raises(SpatialTokensError, match=r"cannot read|does not exist"):
        SPProjector.from_pretrained(tmp_path)


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SpatialTokensError, match=re.escape(f"cannot make the directory {path}: ")):
            build().save_pretrained(path)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_where_a_file_should_be(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SpatialTokensError, match=re.escape(f"cannot write {tmp_path / name}: ")):
        build().save_pretrained(tmp_path)
    assert not any(entry.endswith(".tmp") for entry in os.listdir(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(tmp_path, name):
    build().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SpatialTokensError, match=rf"{re.escape(str(tmp_path / name))}.*(No such file|does not exist)"):
        SPProjector.from_pretrained(tmp_path)


def test_a_missing_directory(tmp_path):
    with pytest.raises(SpatialTokensError, match=r"cannot read .*none/config.json: No such file or directory"):
        SPProjector.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"grid_size": 8}', b"\xff\xfe\xfa", b'{"_name_or_path": "other"}'])
def test_damaged_configs(tmp_path, text):
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(SpatialTokensError):
        SPProjector.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 0.5, 0.99])
def test_truncated_weights(tmp_path, kept):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(SpatialTokensError, match=re.escape(f"{path} is not a complete safetensors file")):
        SPProjector.from_pretrained(tmp_path)


def edited(tensors, **changes):
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {"foreign": torch.ones(1)}, r"missing: extractor.kernels.0.weight, .*; unexpected: foreign"),
        (lambda t: edited(t, **{"patch_head.fc2.bias": None}), r"missing: patch_head.fc2.bias$"),
        (lambda t: edited(t, **{"patch_head.fc3.bias": torch.ones(1)}), r"unexpected: patch_head.fc3.bias$"),
        (
            lambda t: edited(t, **{"patch_head.fc2.bias": torch.ones(8)}),
            r"wrongly shaped: patch_head.fc2.bias \(8,\) instead of \(7,\)$",
        ),
        (lambda t: {name: tensor.int() for name, tensor in t.items()}, r"has tensors of torch.int32; all must be floating"),
        (lambda t: {}, r"missing: extractor.kernels.0.weight"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_configs(tmp_path, edit, message):
    projector = build()
    projector.save_pretrained(tmp_path)
    save_file(edit(dict(projector.state_dict())), tmp_path / "model.safetensors")
    with pytest.raises(SpatialTokensError, match=message):
        SPProjector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_hidden_size": 8}, r"wrongly shaped: spatial_head.fc1.weight \(7, 6\) instead of \(8, 6\), "),
        ({"kernel_sizes": (8,)}, r"unexpected: extractor.kernels.1.weight; wrongly shaped: extractor.kernels.0.weight"),
        ({"detail_kernel_size": None, "detail_stride": None}, r"unexpected: integrator.detail_kernel.weight, "),
        ({"spatial_head": "linear"}, r"missing: spatial_head.fc.weight, spatial_head.fc.bias; unexpected: spatial_head.fc1."),
    ],
)
def test_a_config_that_is_not_the_tensors(tmp_path, changes, message):
    projector = build()
    projector.save_pretrained(tmp_path)
    save_file(projector.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(SPProjectorConfig(**{**SMALL.to_dict(), **changes}).to_json())
    with pytest.raises(SpatialTokensError, match=message):
        SPProjector.from_pretrained(tmp_path)


class Wrapped(nn.Module):
    """As LoRA does: the layer below a name of its own, and more parameters."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 1, bias=False)
        self.lora_b = nn.Linear(1, base.out_features, bias=False)

    def forward(self, features):
        return self.base_layer(features) + self.lora_b(self.lora_a(features))


class Foreign(nn.Module):
    """Any part of the user's own, without the attributes of ours."""

    in_features = spatial_hidden_size = 3
    out_features = 6


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("place", ["extractor.kernels.0", "integrator.detail_kernel", "spatial_head", "patch_head.fc1"])
def test_wrapped_parts_are_not_saved(tmp_path, place, head):
    projector = build(CONFIGS["linear" if head == "linear" else "cropping"])
    if place == "spatial_head":
        place += ".fc" if head == "linear" else ".fc1"
    parent, name = place.rsplit(".", 1)
    setattr(projector.get_submodule(parent), name, Wrapped(projector.get_submodule(place)))
    assert projector(torch.randn(1, 64, 5)).shape == (1, 66, 7)
    with pytest.raises(SpatialTokensError, match=rf"missing: {place}.weight.*unexpected: {place}\.|with a Wrapped"):
        projector.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("integrator", Foreign()),
        ("spatial_head", Foreign()),
        ("patch_head", nn.Linear(5, 7)),
        ("patch_head", nn.Identity()),
    ],
)
def test_parts_that_nothing_describes_are_not_saved(tmp_path, name, part):
    projector = build()
    setattr(projector, name, part)
    with pytest.raises(SpatialTokensError, match=f"no SPProjectorConfig describes a projector with a {type(part).__name__}"):
        projector.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unallocated_projector_is_not_saved(tmp_path):
    build().save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SpatialTokensError, match=r"extractor.kernels.0.weight is on the meta device, without values"):
        build(device="meta").save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_several_dtypes_need_a_choice(tmp_path):
    projector = build(dtype=torch.bfloat16)
    projector.patch_head.float()
    projector.save_pretrained(tmp_path)
    with pytest.raises(
        SpatialTokensError, match=r"has tensors of torch.bfloat16, torch.float32; give the dtype that all should have$"
    ):
        SPProjector.from_pretrained(tmp_path)
    same(SPProjector.from_pretrained(tmp_path, dtype=torch.float32).state_dict(), projector.float().state_dict())
