import json
import pickle
import re
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig
from spatial_tokens.checkpoint import from_llava_sp, to_llava_sp
from spatial_tokens.storage import files
from tests.tolerances import assert_close

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
PREFIXES = ["", "model.", "base_model.model.model."]
load = partial(from_llava_sp, grid_size=8)
TOKENS = {1: (24,), 3: (8, 16, 24), 6: (4, 8, 12, 16, 20, 24), 12: (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24)}


def released(variant="cropping", kernels=(4, 8), detail=4, *, widths=(3, 5, 7), bias=True, dtype=torch.float32, prefix=""):
    """Random weights under the released names (REFERENCE section 6); the largest kernel covers the grid."""
    c, s, d = widths
    shapes = {}
    for k in kernels:
        pooled = variant == "pooling" and k < kernels[-1]
        shapes[f"conv_{k}.1.weight" if pooled else f"conv_{k}.weight"] = (s, c, k, k)
    if detail:
        shapes["conv_CM.weight"] = (s, c, detail, detail)
        for role in ("query", "key", "value"):
            shapes[f"{role}_projector.0.weight"] = shapes[f"{role}_projector.0.bias"] = (s,)
            shapes[f"{role}_projector.1.weight"], shapes[f"{role}_projector.1.bias"] = (s, s), (s,)
    shapes["conv_linear.1.weight"] = (d, 2 * s if detail else s)
    if bias:
        shapes["conv_linear.1.bias"] = (d,)
    shapes["mm_projector.0.weight"], shapes["mm_projector.0.bias"] = (d, c), (d,)
    shapes["mm_projector.2.weight"], shapes["mm_projector.2.bias"] = (d, d), (d,)
    return {prefix + name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def run_released(tensors, variant, kernels, patches):
    """The released model's forward pass, on its own convolutions."""
    grid, linear = kernels[-1], functional.linear
    feature_map = patches.transpose(1, 2).unflatten(2, (grid, grid))
    tokens = []
    for k in kernels:
        margin = (grid - k) // 2
        inside = slice(margin, margin + k)
        window = feature_map[:, :, inside, inside] if variant == "cropping" else functional.adaptive_avg_pool2d(feature_map, k)
        weight = tensors.get(f"conv_{k}.1.weight", tensors.get(f"conv_{k}.weight"))
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], k, bias=False, dtype=weight.dtype)
        convolution.weight = nn.Parameter(weight)
        tokens.append(convolution(window).flatten(1))
    spatial = torch.stack(tokens, dim=1)
    if "conv_CM.weight" in tensors:
        detail = functional.conv2d(feature_map, tensors["conv_CM.weight"], stride=2).flatten(2).transpose(1, 2)

        def project(role, features):
            norm, layer = ([tensors[f"{role}_projector.{i}.{kind}"] for kind in ("weight", "bias")] for i in (0, 1))
            return linear(functional.layer_norm(features, features.shape[-1:], *norm), *layer)

        query, key, value = project("query", spatial), project("key", detail), project("value", detail)
        attention = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
        spatial = torch.cat([spatial, attention @ value], dim=-1)
    spatial = linear(functional.gelu(spatial), tensors["conv_linear.1.weight"], tensors.get("conv_linear.1.bias"))
    hidden = functional.gelu(linear(patches, tensors["mm_projector.0.weight"], tensors["mm_projector.0.bias"]))
    return torch.cat([spatial, linear(hidden, tensors["mm_projector.2.weight"], tensors["mm_projector.2.bias"])], dim=1)


def rest_of_model(prefix):
    """The other weights of a whole model, by name."""
    head = prefix.removesuffix("model.") + "lm_head.weight"
    names = [
        "layers.0.self_attn.q_proj.weight",
        "layers.31.mlp.down_proj.weight",
        "embed_tokens.weight",
        "norm.weight",
        "vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight",
        "image_newline",
    ]
    return {name: torch.ones(2) for name in [head, *(prefix + name for name in names)]}


def refused(message, source=None, **kwargs):
    with pytest.raises(SpatialTokensError, match=message) as caught:
        load(released() if source is None else source, **kwargs)
    assert "\n" not in str(caught.value)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_released_names_of_cropping_with_detail():
    config = SPProjectorConfig.from_preset("llava-sp-cropping", vision_hidden_size=3, spatial_hidden_size=2, text_hidden_size=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_llava_sp(SPProjector.from_config(config)).items()}
    assert shapes == {
        "conv_4.weight": (2, 3, 4, 4),
        "conv_8.weight": (2, 3, 8, 8),
        "conv_12.weight": (2, 3, 12, 12),
        "conv_16.weight": (2, 3, 16, 16),
        "conv_20.weight": (2, 3, 20, 20),
        "conv_24.weight": (2, 3, 24, 24),
        "conv_CM.weight": (2, 3, 16, 16),
        "query_projector.0.weight": (2,),
        "query_projector.0.bias": (2,),
        "query_projector.1.weight": (2, 2),
        "query_projector.1.bias": (2,),
        "key_projector.0.weight": (2,),
        "key_projector.0.bias": (2,),
        "key_projector.1.weight": (2, 2),
        "key_projector.1.bias": (2,),
        "value_projector.0.weight": (2,),
        "value_projector.0.bias": (2,),
        "value_projector.1.weight": (2, 2),
        "value_projector.1.bias": (2,),
        "conv_linear.1.weight": (5, 4),
        "conv_linear.1.bias": (5,),
        "mm_projector.0.weight": (5, 3),
        "mm_projector.0.bias": (5,),
        "mm_projector.2.weight": (5, 5),
        "mm_projector.2.bias": (5,),
    }


def test_released_names_of_pooling():
    config = SPProjectorConfig.from_preset("llava-sp-pooling", vision_hidden_size=3, spatial_hidden_size=2, text_hidden_size=5)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_llava_sp(SPProjector.from_config(config), prefix="model.").items()}
    assert shapes == {
        "model.conv_4.1.weight": (2, 3, 4, 4),
        "model.conv_8.1.weight": (2, 3, 8, 8),
        "model.conv_12.1.weight": (2, 3, 12, 12),
        "model.conv_16.1.weight": (2, 3, 16, 16),
        "model.conv_20.1.weight": (2, 3, 20, 20),
        "model.conv_24.weight": (2, 3, 24, 24),
        "model.conv_linear.1.weight": (5, 2),
        "model.mm_projector.0.weight": (5, 3),
        "model.mm_projector.0.bias": (5,),
        "model.mm_projector.2.weight": (5, 5),
        "model.mm_projector.2.bias": (5,),
    }


@pytest.mark.parametrize("name", ["llava-sp-cropping", "llava-sp-pooling", "llava-sp-pooling-dfi"])
def test_the_presets_are_what_is_inferred(name):
    config = SPProjectorConfig.from_preset(name, vision_hidden_size=3, spatial_hidden_size=2, text_hidden_size=5)
    assert from_llava_sp(to_llava_sp(SPProjector.from_config(config))).config == config


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("detail", [None, 16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_imported_projector_computes_what_the_released_one_does(variant, detail, tokens):
    tensors = released(variant, TOKENS[tokens], detail, dtype=torch.float64, bias=variant == "cropping")
    projector = from_llava_sp(tensors)
    patches = torch.randn(2, 576, 3, dtype=torch.float64)
    assert_close(projector(patches), run_released(tensors, variant, TOKENS[tokens], patches))
    same(to_llava_sp(projector), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("detail", [None, 4])
def test_an_import_is_exported_bit_for_bit(variant, detail, prefix, dtype):
    tensors = released(variant, (2, 4, 6, 8), detail, dtype=dtype, prefix=prefix)
    exported = to_llava_sp(load(tensors), prefix=prefix)
    same(exported, tensors)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in exported.values())


@st.composite
def holdable(draw):
    """Configs that the released names can hold."""
    side = st.integers(1, 8)
    grid, variant = draw(st.tuples(side, side)), draw(st.sampled_from(["cropping", "pooling"]))
    if (grid[0] - grid[1]) % 2:
        variant = "pooling"
    step = 2 if variant == "cropping" else 1
    kernels = draw(st.lists(st.sampled_from(range(min(grid), 0, -step)), min_size=1, max_size=4, unique=True))
    detail = draw(st.none() | st.integers(1, min(grid)))
    return SPProjectorConfig(
        vision_hidden_size=draw(side),
        text_hidden_size=draw(side),
        grid_size=grid,
        variant=variant,
        kernel_sizes=tuple(sorted(kernels)),
        spatial_hidden_size=draw(side),
        detail_kernel_size=detail,
        detail_stride=None if detail is None else draw(st.integers(1, min(3, *grid))),
        spatial_head="linear",
        spatial_head_bias=draw(st.booleans()),
    )


@given(holdable(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.sampled_from(PREFIXES))
@settings(max_examples=60)
def test_an_export_is_imported_bit_for_bit(config, dtype, prefix):
    projector = SPProjector.from_config(config, dtype=dtype)
    back = load(to_llava_sp(projector, prefix=prefix), config=config)
    assert back.config == config
    same(back.state_dict(), projector.state_dict())


@pytest.mark.parametrize(("variant", "detail"), [("cropping", 4), ("pooling", None)])
@pytest.mark.parametrize("basis", ["cosine", "learned"])
def test_factorized_kernels_run_in_the_authors_code(variant, detail, basis):
    config = SPProjectorConfig(
        vision_hidden_size=3, text_hidden_size=7, grid_size=8, variant=variant, kernel_sizes=(4, 8), spatial_hidden_size=5,
        detail_kernel_size=detail, spatial_head="linear", rank=2, frequencies=2, spatial_basis=basis,
    )  # fmt: skip
    projector = SPProjector.from_config(config, dtype=torch.float64)
    patches = torch.randn(2, 64, 3, dtype=torch.float64)
    exported = to_llava_sp(projector)
    assert_close(run_released(exported, variant, (4, 8), patches), projector(patches), 1e-12)
    back = load(exported)
    assert back.config == replace(config, rank=None, frequencies=None, spatial_basis="cosine")
    assert_close(back(patches), projector(patches), 1e-12)


def test_nan_stays_nan():
    tensors = released()
    tensors["conv_4.weight"][1, 2, 3, 0] = tensors["mm_projector.0.bias"][2] = float("nan")
    projector = load(tensors)
    same(to_llava_sp(projector), tensors)
    assert projector(torch.randn(1, 64, 3)).isnan().any()


def test_the_callers_tensors_are_not_touched():
    source = {name: nn.Parameter(tensor) for name, tensor in released(kernels=(1,), detail=1, widths=(1, 1, 1)).items()}
    before = {name: tensor.detach().clone() for name, tensor in source.items()}
    projector = from_llava_sp(source, grid_size=1)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(17)
    same({name: tensor.detach() for name, tensor in source.items()}, before)
    assert all(tensor.requires_grad and tensor.grad is None for tensor in source.values())


def test_an_imported_projector_can_be_trained():
    tensors = released()
    projector = load(tensors)
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in projector.parameters())
    projector(torch.randn(2, 64, 3)).square().mean().backward()
    torch.optim.SGD(projector.parameters(), lr=0.1).step()
    assert not torch.equal(to_llava_sp(projector)["conv_4.weight"], tensors["conv_4.weight"])


def test_dtype_and_device_can_be_chosen():
    tensors = released()
    same(to_llava_sp(load(tensors, dtype=torch.bfloat16, device="cpu")), {n: t.bfloat16() for n, t in tensors.items()})
    assert {parameter.device.type for parameter in load(tensors, device="meta").parameters()} == {"meta"}


def as_state_dict(tensors, folder):
    return tensors


def as_file(name, save):
    def write(tensors, folder):
        save(tensors, folder / name)
        return folder / name

    return write


def as_folder(name, save):
    def write(tensors, folder):
        save(tensors, folder / name)
        save_file({"unrelated": torch.ones(1)}, folder / "adapter_model.safetensors")
        return str(folder)

    return write


def as_shards(index, suffix, save, *, by_folder=False):
    """Two shards of the projector, a third of the rest of the model that is not there."""

    def write(tensors, folder):
        mine, weight_map = {}, {}
        for i, name in enumerate(tensors):
            shard = f"shard-{i % 2}{suffix}"
            weight_map[name] = "absent" + suffix if "layers." in name or "lm_head" in name else shard
            if weight_map[name] == shard:
                mine.setdefault(shard, {})[name] = tensors[name]
        for shard, held in mine.items():
            save(held, folder / shard)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return folder if by_folder else folder / index

    return write


SOURCES = {
    "state dict": as_state_dict,
    ".bin": as_file("any.bin", torch.save),
    ".pt": as_file("any.pt", torch.save),
    ".safetensors": as_file("any.safetensors", save_file),
    "non_lora_trainables.bin": as_folder("non_lora_trainables.bin", torch.save),
    "mm_projector.bin": as_folder("mm_projector.bin", torch.save),
    "model.safetensors": as_folder("model.safetensors", save_file),
    "pytorch_model.bin": as_folder("pytorch_model.bin", torch.save),
    "safetensors index": as_shards("model.safetensors.index.json", ".safetensors", save_file),
    "folder of safetensors": as_shards("model.safetensors.index.json", ".safetensors", save_file, by_folder=True),
    "bin index": as_shards("pytorch_model.bin.index.json", ".bin", torch.save),
    "folder of bins": as_shards("pytorch_model.bin.index.json", ".bin", torch.save, by_folder=True),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_every_source_amid_a_whole_model(tmp_path, source, prefix, variant):
    tensors = released(variant, prefix=prefix)
    projector = load(SOURCES[source](tensors | rest_of_model(prefix), tmp_path))
    same(to_llava_sp(projector, prefix=prefix), tensors)


def test_the_rest_of_a_model_is_not_read(tmp_path, monkeypatch):
    tensors, read = released(prefix="model."), []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def metadata(self):
            return self.file.metadata()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    safe_open = files.safe_open
    save_file(tensors | rest_of_model("model."), tmp_path / "model.safetensors")
    monkeypatch.setattr(files, "safe_open", Recorder)
    load(tmp_path)
    assert sorted(read) == sorted(tensors)


def test_a_projector_read_from_a_file_outlives_it(tmp_path):
    tensors = released()
    save_file(tensors, tmp_path / "model.safetensors")
    projector = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    same(to_llava_sp(projector), tensors)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.5, 0.99, -1])
def test_truncated_files(tmp_path, suffix, kept):
    path = SOURCES[suffix](released(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refused(f"{re.escape(str(path))} is not a complete", path)


@pytest.mark.parametrize("name", ["text.bin", "text.safetensors", "text.txt"])
def test_text_files(tmp_path, name):
    (tmp_path / name).write_text("these are not the weights that you are looking for\n")
    refused(f"{name} is not a complete", tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    refused("none.bin does not exist; give a weight file, an index file or a folder", tmp_path / "none.bin")
    refused(f"no weights in {re.escape(str(tmp_path))}; looked for model.safetensors", tmp_path)


@pytest.mark.parametrize("lost", ["shard-0.safetensors", "shard-1.safetensors"])
def test_an_index_that_names_a_missing_shard(tmp_path, lost):
    index = SOURCES["safetensors index"](released(), tmp_path)
    (tmp_path / lost).unlink()
    refused(f"names the shard '{lost}', which is not a file beside it", index)


def test_an_index_that_names_a_shard_outside_its_folder(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(released(), tmp_path / "x.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(released(), "../x.safetensors")}))
    refused(r"names the shard '\.\./x.safetensors', which is not a file beside it", index)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": [1]}'])
def test_a_malformed_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused("is not an index of shards", tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["any.bin", "mm_projector.bin"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name):
    trace = tmp_path / "trace"
    torch.save({**released(), "conv_4.weight": Payload(trace)}, tmp_path / name)
    refused("is not a complete PyTorch file of tensors alone", tmp_path if name == "mm_projector.bin" else tmp_path / name)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace))).close()
    assert trace.exists(), "the payload is not live, so the test shows nothing"


@pytest.mark.parametrize(
    "name",
    [
        "conv_CM.weight",
        "query_projector.0.weight",
        "value_projector.1.bias",
        "conv_linear.1.weight",
        "mm_projector.0.weight",
        "mm_projector.2.bias",
    ],
)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_missing_tensor_is_listed(prefix, name):
    given_names = without(released(prefix=prefix), prefix + name)
    if name == "conv_CM.weight":  # then there is no integrator, and its other parts are in the way
        refused("unexpected: query_projector.0.weight, ", given_names)
    else:
        refused(f"missing: {name}$", given_names)


SIX = TOKENS[6]


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("kept", [kept for count in range(1, 6) for kept in combinations(SIX, count)])
def test_lost_kernels_are_named(variant, kept):
    """Every subset of the released kernels but those that are a model of table 4."""
    tensors = released(variant, SIX, None, widths=(1, 1, 1))
    lost = [f"conv_{k}.1.weight" if variant == "pooling" and k < 24 else f"conv_{k}.weight" for k in SIX if k not in kept]
    if kept in TOKENS.values():
        assert from_llava_sp(without(tensors, *lost)).config.kernel_sizes == kept
        return
    message = f"has the kernels {', '.join(map(str, kept))} on a grid of 24 x 24: missing: {', '.join(lost)}; find the complete"
    refused(message, without(tensors, *lost), grid_size=24)
    preset = "llava-sp-cropping" if variant == "cropping" else "llava-sp-pooling"
    sizes = {"vision_hidden_size": 1, "spatial_hidden_size": 1, "text_hidden_size": 1}
    config = SPProjectorConfig.from_preset(preset, **sizes, spatial_head_bias=True, detail_kernel_size=None)
    refused(f"missing: {', '.join(lost)}$", without(tensors, *lost), config=config)
    as_kept = replace(config, kernel_sizes=kept)
    assert from_llava_sp(without(tensors, *lost), config=as_kept).config == as_kept


def test_a_checkpoint_of_another_grid_says_so():
    tensors = released(kernels=(4, 8, 12, 16))
    refused(r"on a grid of 24 x 24: missing: conv_20.weight, conv_24.weight; .* give the config", tensors, grid_size=24)
    assert from_llava_sp(tensors, grid_size=16).config.grid_size == (16, 16)
    refused("on a grid of 12 x 12: no released model has these;", tensors, grid_size=12)
    refused("grid_size must be a positive integer, got 0", tensors, grid_size=0)


def test_a_stage_1_step_checkpoint():
    """The released code keeps `conv_4` and the MLP of the patches, and nothing else of the projector (REFERENCE section 9)."""
    tensors = {name: each for name, each in released(kernels=SIX, widths=(1, 1, 1)).items() if name.startswith(("conv_4.", "mm_"))}
    refused("missing: conv_8.weight, conv_12.weight, conv_16.weight, conv_20.weight, conv_24.weight;", tensors, grid_size=24)


@pytest.mark.parametrize("name", ["conv_6.bias", "mm_projector.1.weight", "conv_linear.0.weight", "optimizer"])
def test_an_unexpected_tensor_is_listed(name):
    refused(rf"unexpected: .*{name}$", {**released(), name: torch.ones(5, 3, 4, 4)})


def test_a_kernel_under_two_names_is_noticed():
    refused(r"unexpected: conv_4(\.1)?\.weight$", {**released(), "conv_4.1.weight": torch.ones(5, 3, 4, 4)})


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("conv_4.weight", (5, 3, 4, 5), (5, 3, 4, 4)),
        ("conv_4.weight", (5, 48), (5, 3, 4, 4)),
        ("conv_4.weight", (5, 4, 4, 3), (5, 3, 4, 4)),
        ("conv_CM.weight", (5, 3, 4, 3), None),
        ("query_projector.1.weight", (5, 4), (5, 5)),
        ("conv_linear.1.weight", (7, 5), (7, 10)),
        ("conv_linear.1.bias", (8,), (7,)),
        ("mm_projector.2.weight", (7,), (7, 7)),
    ],
)
def test_a_wrongly_shaped_tensor_is_listed(name, shape, expected):
    instead = f" instead of {expected}" if expected else ""
    message = f"wrongly shaped: {name} {shape}{instead}"
    refused(re.escape(message), {**released(), name: torch.ones(shape)})


@pytest.mark.parametrize("name", ["conv_8.weight", "conv_CM.weight", "mm_projector.0.weight"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 3, 8), (5, 3, 8, 8, 1)])
def test_a_tensor_of_another_rank_is_listed(name, shape):
    refused(rf"wrongly shaped: {name} {re.escape(str(shape))}", {**released(), name: torch.ones(shape)})


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"weight": torch.ones(2)},
        {"mm_projector.0.weight": torch.ones(2, 2)},
        {"conv_CM.weight": torch.ones(2, 2, 2, 2)},
        rest_of_model("model."),
        {f"vision.{name}": tensor for name, tensor in released().items()},
    ],
)
def test_foreign_weights(source):
    refused("the state dict holds no single LLaVA-SP projector: expected conv_{k}.weight under one of the prefixes", source)


@pytest.mark.parametrize(
    "source",
    [
        0,
        3.0,
        [torch.ones(2)],
        {**released(), "conv_4.weight": None},
        {**released(), "mm_projector.0.weight": [1.0]},
        {"state_dict": released()},
        {**released(), 0: torch.ones(1)},
    ],
)
def test_what_is_no_state_dict(source):
    refused("source must be a path, or a state dict of names to tensors", source)


@pytest.mark.parametrize(
    "moved", ["conv_4.weight", "mm_projector.0.weight", "mm_projector.0.bias", "conv_linear.1.bias", "query_projector.0.bias"]
)
@pytest.mark.parametrize(("prefix", "other"), [("model.", ""), ("", "model."), ("base_model.model.model.", "model.")])
@pytest.mark.parametrize("twice", [False, True])
def test_mixed_prefixes(moved, prefix, other, twice):
    tensors = released(prefix=prefix)
    tensors[other + moved] = torch.ones_like(tensors[prefix + moved])
    refused(r"under|missing|unexpected", tensors if twice else without(tensors, prefix + moved))


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_several_dtypes_need_a_choice(other):
    tensors = {**released(), "mm_projector.0.bias": torch.ones(7, dtype=other)}
    refused(rf"the state dict has tensors of .*{other}.*; give the dtype that all should have", tensors)
    same(to_llava_sp(load(tensors, dtype=torch.float16)), {name: tensor.half() for name, tensor in tensors.items()})


@pytest.mark.parametrize("suffix", [".bin", "state dict"])
def test_weights_without_values(tmp_path, suffix):
    source = SOURCES[suffix]({**released(), "conv_8.weight": torch.ones(5, 3, 8, 8, device="meta")}, tmp_path)
    refused("^cannot use .*: conv_8.weight is on the meta device, without values", source)


def test_packed_weights_are_named():
    """As bitsandbytes keeps a linear layer of the MLP of the patches."""
    packed = {"mm_projector.0.weight": torch.ones(11, 1, dtype=torch.uint8), "mm_projector.0.weight.absmax": torch.ones(1)}
    refused(r"the state dict holds 4-bit weights of bitsandbytes \(mm_projector.0.weight\)", {**released(), **packed})
    packed = without(released(), "mm_projector.0.weight") | {"mm_projector.0.qweight": torch.ones(1, 7, dtype=torch.int32)}
    refused(r"the state dict holds packed weights of GPTQ or AWQ \(mm_projector.0.qweight\)", packed)


@pytest.mark.parametrize("given_dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_are_not_floating(given_dtype, dtype):
    tensors = {name: tensor.to(given_dtype) for name, tensor in released().items()}
    refused(rf"the state dict has tensors of {given_dtype}; all must be floating point", tensors, dtype=dtype)


def test_other_kernels_need_a_config():
    tensors = released(kernels=(2, 4, 8))
    refused(r"has the kernels 2, 4, 8 on a grid of 8 x 8: missing: conv_6.weight; .* give the config", tensors)
    config = replace(CONFIG, kernel_sizes=(2, 4, 8))
    projector = from_llava_sp(tensors, config=config)
    assert projector.config == config
    same(to_llava_sp(projector), tensors)
    pooled = released("pooling", (2, 4))
    pooled["conv_4.1.weight"] = pooled.pop("conv_4.weight")
    config = replace(CONFIG, variant="pooling", kernel_sizes=(2, 4))
    assert from_llava_sp(pooled, config=config).config == config


CONFIG = SPProjectorConfig(
    vision_hidden_size=3,
    text_hidden_size=7,
    grid_size=8,
    kernel_sizes=(4, 8),
    spatial_hidden_size=5,
    detail_kernel_size=4,
    spatial_head="linear",
)


def test_a_config_tells_what_no_weight_does():
    config = replace(CONFIG, grid_size=(12, 12), detail_stride=3)
    projector = load(released(), config=config)
    assert projector.config == config
    assert projector(torch.randn(1, 144, 3)).shape == (1, 146, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_hidden_size": 4}, r"wrongly shaped: conv_4.weight \(5, 3, 4, 4\) instead of \(5, 4, 4, 4\), "),
        ({"spatial_hidden_size": 6}, r"wrongly shaped: conv_4.weight \(5, 3, 4, 4\) instead of \(6, 3, 4, 4\), "),
        ({"text_hidden_size": 8}, r"wrongly shaped: conv_linear.1.weight \(7, 10\) instead of \(8, 10\), "),
        ({"kernel_sizes": (8,)}, r"unexpected: conv_4.weight$"),
        ({"kernel_sizes": (2, 4, 8)}, r"missing: conv_2.weight$"),
        ({"variant": "pooling"}, r"missing: conv_4.1.weight; unexpected: conv_4.weight$"),
        ({"detail_kernel_size": None, "detail_stride": None}, r"unexpected: conv_CM.weight, query_projector.0.weight, "),
        ({"detail_kernel_size": 6}, r"wrongly shaped: conv_CM.weight \(5, 3, 4, 4\) instead of \(5, 3, 6, 6\)$"),
        ({"spatial_head_bias": False}, r"unexpected: conv_linear.1.bias$"),
        (
            {"spatial_head": "mlp"},
            r"the released names hold square kernels, spatial_head='linear' and patch_head='mlp', got .*spatial_head='mlp'",
        ),
    ],
)
def test_a_config_that_the_checkpoint_contradicts(changes, message):
    refused(message, config=replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"spatial_head": "mlp"},
        {"kernel_sizes": ((4, 6), 8)},
        {"kernel_sizes": ((2, 4), (4, 8))},
        {"patch_head": None},
        {"detail_kernel_size": (4, 3)},
    ],
)
def test_projectors_that_the_released_names_cannot_hold(changes):
    projector = SPProjector.from_config(replace(CONFIG, **changes))
    with pytest.raises(
        SpatialTokensError,
        match=r"the released names hold square kernels, spatial_head='linear' and patch_head='mlp', got .*save_pretrained",
    ):
        to_llava_sp(projector)


def test_a_wrapped_projector_is_not_exported():
    projector = SPProjector.from_config(CONFIG)
    projector.extractor.kernels[1] = nn.Sequential(projector.extractor.kernels[1])
    with pytest.raises(SpatialTokensError, match=r"missing: extractor.kernels.1.weight; unexpected: extractor.kernels.1.0.weight"):
        to_llava_sp(projector)


@pytest.mark.parametrize("projector", [None, nn.Linear(2, 2), {}])
def test_what_is_no_projector(projector):
    with pytest.raises(SpatialTokensError, match=f"projector must be an SPProjector, got a {type(projector).__name__}"):
        to_llava_sp(projector)


@pytest.mark.parametrize("prefix", ["model", "base_model.", None, "x."])
def test_unknown_prefixes(prefix):
    with pytest.raises(
        SpatialTokensError, match=re.escape(f"prefix must be one of 'base_model.model.model.', 'model.', '', got {prefix!r}")
    ):
        to_llava_sp(SPProjector.from_config(CONFIG), prefix=prefix)


def test_factorized_configs_are_none_of_released_files():
    config = SPProjectorConfig(
        vision_hidden_size=8, text_hidden_size=8, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=4, detail_kernel_size=4,
        spatial_head="linear", rank=4,
    )  # fmt: skip
    released = to_llava_sp(SPProjector.from_config(config))
    with pytest.raises(
        SpatialTokensError, match="the state dict holds dense kernels, as all released files do; give a config without"
    ):
        from_llava_sp(released, config=config)
