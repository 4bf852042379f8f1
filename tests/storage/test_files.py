import gzip
import json
import os
import pickle
import re
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spatial_tokens import SpatialTokensError, SPProjector
from spatial_tokens.storage.directories import new_directory
from spatial_tokens.storage.files import (
    atomic_write,
    check_writable,
    make_directory,
    read_safetensors,
    read_tensors,
    write_tensors,
    write_text,
)
from spatial_tokens.storage.text import read_text
from spatial_tokens.training.checkpoints import check_complete, last_complete, mark_complete
from tests.storage.test_pretrained import build

same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
legacy_save = partial(torch.save, _use_new_zipfile_serialization=False)


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.c": torch.tensor([float("nan"), 1, 2], dtype=torch.bfloat16),
    "d": torch.tensor(3),
}
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage", "ignore:Defining your `__torch")
SUFFIXES = {".safetensors": save_file, ".bin": torch.save, ".pt": legacy_save}


@contextmanager
def refused(message):
    with pytest.raises(SpatialTokensError, match=message) as caught:
        yield caught
    assert "\n" not in str(caught.value)


class Payload:
    """A pickle of it runs code: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == target.suffix
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    ("error", "becomes"), [(OSError(28, "No space left on device"), SpatialTokensError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
@pytest.mark.parametrize("before", ["old", None])
def test_a_failed_write_leaves_what_was_there(tmp_path, error, becomes, before):
    target = tmp_path / "file"
    if before:
        target.write_text(before)

    def write():
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(becomes):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"file": before} if before else {})


def test_a_failed_write_says_where_and_why(tmp_path):
    with refused(re.escape(f"cannot write {tmp_path}/file: No space left on device")), atomic_write(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    (tmp_path / "directory").mkdir()
    with refused(re.escape(f"cannot write {tmp_path}/directory: ")):
        write_text(tmp_path / "directory", "text")
    with refused(re.escape(f"cannot write {tmp_path}/none/file: No such file or directory")):
        write_text(tmp_path / "none" / "file", "text")


def test_text_round_trip(tmp_path):
    write_text(tmp_path / "file", "größe ☃\n")
    assert (tmp_path / "file").read_bytes() == "größe ☃\n".encode()
    assert read_text(tmp_path / "file") == "größe ☃\n"


def test_unreadable_text(tmp_path):
    (tmp_path / "latin").write_bytes("größe".encode("latin-1"))
    for name, reason in (("none", "No such file or directory"), ("latin", "'utf-8' codec can't decode"), ("", "Is a directory")):
        with refused(re.escape(f"cannot read {tmp_path / name}: {reason}")):
            read_text(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_round_trip(tmp_path, suffix):
    write_tensors(tmp_path / f"file{suffix}", TENSORS, {"library": "it"})
    same(read_tensors(tmp_path / f"file{suffix}"), TENSORS)
    assert os.listdir(tmp_path) == [f"file{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strided_and_trained_tensors_are_written_as_values(tmp_path, suffix):
    strided = torch.randn(6, 4, requires_grad=True)[::2].T
    write_tensors(tmp_path / f"file{suffix}", {"a": strided}, {})
    (back,) = read_tensors(tmp_path / f"file{suffix}").values()
    same(back, strided.detach())
    assert back.is_contiguous()
    assert not back.requires_grad
    assert (tmp_path / f"file{suffix}").stat().st_size < 2500


def test_what_others_write_is_read(tmp_path):
    for suffix, save in SUFFIXES.items():
        save(TENSORS, tmp_path / f"file{suffix}")
        same(read_tensors(str(tmp_path / f"file{suffix}")), TENSORS)
    write_tensors(tmp_path / "file.safetensors", TENSORS, {})
    same(load_file(tmp_path / "file.safetensors"), TENSORS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_wanted_names_are_read(tmp_path, suffix):
    write_tensors(tmp_path / f"file{suffix}", TENSORS, {})
    assert list(read_tensors(tmp_path / f"file{suffix}", lambda name: "." in name)) == ["b.c"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_without_values_are_not_written(tmp_path, suffix):
    with refused("'?a'? is on the meta device, without values"):
        write_tensors(tmp_path / f"file{suffix}", {"a": torch.empty(2, device="meta")}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("held", "read"),
    [
        (["mm_projector.bin"], "mm_projector.bin"),
        (["mm_projector.bin", "non_lora_trainables.bin"], "non_lora_trainables.bin"),
        (["model.safetensors", "mm_projector.bin", "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "training_args.bin", "adapter_model.safetensors", "optimizer.pt"], "pytorch_model.bin"),
    ],
)
def test_a_folder_is_read_by_the_name_of_its_weights(tmp_path, held, read):
    for i, name in enumerate(held):
        SUFFIXES[Path(name).suffix]({"from": torch.tensor(i)}, tmp_path / name)
    assert read_tensors(tmp_path) == {"from": torch.tensor(held.index(read))}


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with refused(re.escape(f"no weights in {tmp_path}; looked for model.safetensors, ")):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["none.safetensors", "none.bin", "none/model.safetensors", "none\0.bin", "n" * 5000])
def test_a_file_that_does_not_exist(tmp_path, name):
    with refused("does not exist; give a weight file, an index file or a folder of them|File name too long"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    SUFFIXES[suffix](TENSORS, path)
    whole = path.read_bytes()
    for length in {*range(40), *range(40, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with refused(rf"{re.escape(str(path))} is not a complete"):
            read_tensors(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"


def stored(value, save):
    with tempfile.TemporaryDirectory() as folder:
        save(value, Path(folder, "file"))
        return Path(folder, "file").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "it is empty: download or write it again"),
        (b"\0" * 2000, "it is zeros where its header should be: download or copy it again"),
        (LFS, "it is a Git LFS pointer instead of the file: run 'git lfs pull' in its repository"),
        (b"../.git/annex/objects/a/b\n", r"it is text instead of weights: '\.\./\.git/annex"),
        (b"/annex/objects/SHA256E-s1--2\n", "it is a git-annex pointer instead of the file: run 'git annex get'"),
        (b"<html>not found</html>", "it is a web page instead of the file: log in, "),
        (b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html>", "it is a web page instead of the file: log in, "),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is an XML document, such as a server's error"),
        (b'{"error": "Repository not found"}', r"""it is JSON instead of weights: '\{"error": "Repository not found"\}'"""),
        (b"{}", r"it is JSON instead of weights: '\{\}'"),
        ("Entry not found ☃".encode() * 99, "it is text instead of weights: 'Entry not found ☃Entry"),
        (gzip.compress(b"weights", mtime=0), "it is a gzip archive: unpack it first"),
        (b"PK\x03\x04" + b"\0" * 40, "it is a zip archive: unpack it first"),
        (b"\0" * 257 + b"ustar\0", "it is a tar archive: unpack it first"),
        (b"GGUF\3\0\0\0", "it is a GGUF file"),
        (b"\x80\x02.", "PyTorch file"),
        (b"\xff" * 64, ""),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_named(tmp_path, suffix, content, kind):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with refused(f"^{re.escape(str(path))} is not a complete .*{kind}") as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)
    assert "header" not in str(caught.value) or content[:1] in b"\0\xff"


def test_weights_under_a_name_of_another_kind(tmp_path):
    (tmp_path / "a.bin").write_bytes(stored(TENSORS, save_file))
    with refused("it is a safetensors file: rename it to end in .safetensors"):
        read_tensors(tmp_path / "a.bin")
    for save in (torch.save, legacy_save):
        (tmp_path / "a.safetensors").write_bytes(stored(TENSORS, save))
        with refused("it is a PyTorch file: rename it to end in .bin"):
            read_tensors(tmp_path / "a.safetensors")


def test_a_pointer_instead_of_text(tmp_path):
    (tmp_path / "config.json").write_bytes(LFS)
    with refused("cannot read .*config.json: it is a Git LFS pointer instead of the file: run 'git lfs pull'"):
        read_text(tmp_path / "config.json")


@given(
    st.sampled_from(sorted(SUFFIXES)),
    st.binary(max_size=60) | st.text("\x80\x02.}q(uN\x00\x01ab0\n])tRK", max_size=15).map(lambda t: t.encode("latin-1")),
)
@example(".bin", pickle.dumps({"a": 1}, protocol=2))
def test_no_bytes_raise_anything_else(suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{suffix}")
        path.write_bytes(content)
        with pytest.raises(SpatialTokensError):
            read_tensors(path)


@given(st.sampled_from(sorted(SUFFIXES)), st.data())
def test_no_damage_raises_anything_else(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{suffix}")
        SUFFIXES[suffix](TENSORS, path)
        content = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            assert isinstance(read_tensors(path), dict)
        except SpatialTokensError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("save", [torch.save, legacy_save, plain_pickle])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, save, nested):
    trace, path = tmp_path / "trace", tmp_path / "file.bin"
    save({"a": Payload(trace)} if nested else Payload(trace), path)
    with refused("is not a complete PyTorch file of tensors alone") as caught:
        read_tensors(path)
    named = "it is damaged, or was not" if save is plain_pickle else "it holds io.open, which needs code to be run"
    assert named in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is not live, so the test shows nothing"


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_programs_are_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "file.pt")
    with refused("it is a TorchScript program; get the state dict that it was made of"):
        read_tensors(tmp_path / "file.pt")


def test_advice_to_run_code_is_not_passed_on(tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("cannot load this with weights_only=True; set weights_only=False")

    (tmp_path / "file.bin").write_bytes(b"\x80\x02\xff")
    monkeypatch.setattr(torch, "load", load)
    with refused(r"file\.bin is not a complete .*: it is damaged, or was not written by torch\.save$"):
        read_tensors(tmp_path / "file.bin")


def test_tensors_without_values_are_not_read(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.ones(2, device="meta")}, tmp_path / "file.bin")
    with refused(r"cannot use .*file\.bin: b is on the meta device, without values"):
        read_tensors(tmp_path / "file.bin")
    same(read_tensors(tmp_path / "file.bin", lambda name: name == "a"), {"a": torch.ones(2)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_read_does_not_change_with_its_file(tmp_path, suffix):
    """A mapped file's values would, and reading them would end the process once the file is cut."""
    path = tmp_path / f"file{suffix}"
    SUFFIXES[suffix](TENSORS, path)
    read = read_tensors(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    same(read, TENSORS)
    os.truncate(path, 0)
    same(read, TENSORS)


def test_a_file_that_is_replaced_while_it_is_opened_is_read_as_it_was(tmp_path, monkeypatch):
    """safetensors reads the header, and then lets PyTorch map the file by its name."""
    path, open_by_name, opened = tmp_path / "file.safetensors", torch.UntypedStorage.from_file, []
    write_tensors(path, TENSORS, {"save": "first"})

    def replaced(*args, **options):
        opened.append(args)
        write_tensors(path, {name: torch.zeros_like(each) for name, each in TENSORS.items()}, {"save": "second"})
        return open_by_name(*args, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", staticmethod(replaced))
    tensors, metadata = read_safetensors(path)
    same(tensors, TENSORS)
    assert metadata["save"] == "first"
    assert opened


@pytest.mark.parametrize("path", [None, 3, b"file", ["file"]])
@pytest.mark.parametrize(
    "call",
    [read_text, read_tensors, read_safetensors, make_directory, check_writable, partial(write_text, text=""),
     partial(write_tensors, tensors={}, metadata={}), lambda path: new_directory(path, print).__enter__(),
     mark_complete, check_complete, last_complete, SPProjector.from_pretrained, build().save_pretrained],
)  # fmt: skip
def test_what_is_no_path(call, path):
    with refused("directory must be a path, got "):
        call(path)


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(2)],
        torch.ones(2),
        {"state_dict": {"a": torch.ones(2)}},
        {"a": torch.ones(2), "step": 3},
        "text",
        None,
        {0: torch.ones(2)},
    ],
)
@pytest.mark.parametrize("save", [torch.save, legacy_save])
def test_pickles_that_are_no_state_dict(tmp_path, save, value):
    save(value, tmp_path / "file.bin")
    with refused(f"file.bin holds a {type(value).__name__} that is not a state dict of tensors"):
        read_tensors(tmp_path / "file.bin")


def write_shards(folder, shards, *, lost=(), suffix=".safetensors"):
    """Shards and their index; the shards in `lost` are listed but not written."""
    files = {f"model-{i}{suffix}": tensors for i, tensors in enumerate(shards)}
    for i, (name, tensors) in enumerate(files.items()):
        if i not in lost:
            SUFFIXES[suffix](tensors, folder / name)
    index = folder / ("model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: name for name, tensors in files.items() for key in tensors}}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path, suffix):
    index = write_shards(tmp_path, [{"a": TENSORS["a"]}, {"b.c": TENSORS["b.c"], "d": TENSORS["d"]}], suffix=suffix)
    same(read_tensors(index), TENSORS)
    same(read_tensors(tmp_path), TENSORS)


def test_shards_without_wanted_names_are_not_opened(tmp_path):
    index = write_shards(tmp_path, [{"a": TENSORS["a"]}, {"b.c": TENSORS["b.c"]}], lost=[0])
    assert list(read_tensors(index, lambda name: name == "b.c")) == ["b.c"]
    with refused("names the shard 'model-0.safetensors', which is not a file beside it"):
        read_tensors(index)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "inner/x.safetensors", "..", ".", "", "none.bin", "\0", "n" * 5000, "{folder}/x.safetensors"],
)
def test_shards_outside_the_folder(tmp_path, shard):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", folder / "x.safetensors", folder / "inner" / "x.safetensors"):
        save_file({"a": torch.ones(1)}, place)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.format(folder=folder)}}))
    with refused("names the shard .*, which is not a file beside it"):
        read_tensors(index)


def test_an_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with refused(re.escape(index.name)):
        read_tensors(index)


def test_tensors_that_a_shard_does_not_hold(tmp_path):
    index = write_shards(tmp_path, [{"a": TENSORS["a"], "d": TENSORS["d"]}])
    save_file({"a": TENSORS["a"]}, tmp_path / "model-0.safetensors")
    with refused("lists tensors that its shards do not hold: d$"):
        read_tensors(index)


NO_INDEX = ["", "{", "[]", "{}", "3", "null", '"weight_map"', "[" * 99_999]
NO_MAP = [json.dumps({"weight_map": value}) for value in (None, [], 3, "a", {"a": 1}, {"a": None}, {"a": ["b"]})]


@pytest.mark.parametrize("text", NO_INDEX + NO_MAP)
def test_malformed_indices(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with refused("is not an index of shards: it needs a 'weight_map' of names to files"):
        read_tensors(index)


def test_an_index_that_is_not_text(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff\xfe")
    with refused("cannot read .*index.json"):
        read_tensors(tmp_path)
