"""Projectors on the Hugging Face Hub, both ways, by the real client and a Hub on this machine."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from spatial_tokens import SpatialTokensError, SPProjector, SPProjectorConfig, __version__
from spatial_tokens.errors import MissingExtraError
from spatial_tokens.storage import hub
from tests.fake_hub import fake_hub, no_connection

pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

CONFIG = SPProjectorConfig(
    vision_hidden_size=5, text_hidden_size=7, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=3, detail_kernel_size=4
)
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def projector():
    return SPProjector.from_config(CONFIG)


@pytest.fixture
def there(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


def refused(message, work):
    with pytest.raises(SpatialTokensError, match=re.escape(message)) as caught:
        work()
    assert "\n" not in str(caught.value)


def test_there_and_back(there, projector):
    assert projector.push_to_hub("me/mine", datasets=["us/pictures"], commit_message="first").endswith("/me/mine")
    assert sorted(there.files("me/mine")[1]) == [".gitattributes", *FILES]
    loaded = SPProjector.from_pretrained("me/mine")
    assert loaded.config == CONFIG
    assert same(loaded, projector)
    assert SPProjector.from_pretrained("me/mine", dtype=torch.float64).spatial_head.fc1.weight.dtype == torch.float64


def test_the_card_says_how_to_load_it(there, projector):
    projector.push_to_hub("me/mine", datasets=["us/pictures"])
    card = there.files("me/mine")[1]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "spatial-tokens"
    assert metadata["datasets"] == ["us/pictures"]
    assert {"spatial-tokens", "llava-sp", "arxiv:2507.00505"} <= set(metadata["tags"])
    assert "https://arxiv.org/abs/2507.00505" in card
    assert f"{CONFIG.num_parameters:,}" in card
    names = {}
    exec(code_of(card), names)
    assert same(names["projector"], projector)
    assert names["tokens"].shape == (1, CONFIG.num_tokens, CONFIG.text_hidden_size)


def test_what_it_was_trained_on_may_be_unknown(there, projector):
    projector.push_to_hub("me/mine")
    card = there.files("me/mine")[1]["README.md"].decode()
    assert "datasets" not in yaml.safe_load(card.split("---")[1])
    assert "## Training data\n\nNot stated." in card


def test_a_card_that_is_there_is_kept(there, projector):
    there.commit("me/mine", {"README.md": b"my own words"})
    projector.push_to_hub("me/mine")
    assert there.files("me/mine")[1]["README.md"] == b"my own words"
    assert same(SPProjector.from_pretrained("me/mine"), projector)


def test_revisions(there, projector):
    other = SPProjector.from_config(CONFIG)
    projector.push_to_hub("me/mine")
    first = there.files("me/mine")[0]
    other.push_to_hub("me/mine", revision="next")
    for revision, expected in ((None, projector), ("main", projector), ("next", other), (first, projector)):
        assert same(SPProjector.from_pretrained("me/mine", revision=revision), expected)
    other.push_to_hub("me/mine")
    assert same(SPProjector.from_pretrained("me/mine"), other)
    assert same(SPProjector.from_pretrained("me/mine", revision=first), projector)


def test_a_new_repository_is_as_private_as_asked(there, projector):
    for name, private in (("me/open", None), ("me/closed", True)):
        projector.push_to_hub(name, private=private)
        assert bool(there.private[name]) is bool(private)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("me/nothing", None, "me/nothing is neither a folder here nor a repository on the Hugging Face Hub that you can read"),
        ("me/mine", "v9", "me/mine on the Hugging Face Hub has no revision 'v9'"),
        ("me/empty", None, "me/empty on the Hugging Face Hub has no config.json and no model.safetensors"),
    ],
)
def test_what_is_not_there(there, projector, name, revision, message):
    projector.push_to_hub("me/mine")
    there.commit("me/empty", {"notes.txt": b""})
    refused(message, lambda: SPProjector.from_pretrained(name, revision=revision))


def test_a_file_of_a_newer_version(there, projector):
    projector.push_to_hub("me/mine")
    values = {"library": "spatial-tokens 99.0", **CONFIG.to_dict(), "rotation": 3}
    there.commit("me/mine", {"config.json": json.dumps(values).encode()})
    refused(
        f"written by spatial-tokens 99.0, newer than this spatial-tokens {__version__}; upgrade the library: unknown field 'rot",
        lambda: SPProjector.from_pretrained("me/mine"),
    )


def test_a_folder_of_the_name_comes_first(there, projector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    projector.save_pretrained("me/mine")
    assert same(SPProjector.from_pretrained("me/mine"), projector)
    refused("revision is for a repository", lambda: SPProjector.from_pretrained("me/mine", revision="main"))
    assert not there.requests


@pytest.mark.parametrize(
    "source", [Path("me/mine"), "mine", "./me/mine", "a/me/mine", "../mine", "me/mine/", "C:\\me\\mine", "me/mi ne"]
)
def test_paths_are_not_looked_for_on_the_hub(there, source):
    refused("cannot read ", lambda: SPProjector.from_pretrained(source))
    refused("but ", lambda: SPProjector.from_pretrained(source, revision="main"))
    assert not there.requests


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "./mine", "me/", 3, None, "me/mi ne"])
def test_names_that_no_repository_has(there, projector, repo_id):
    refused("repo_id must be a repository of the Hugging Face Hub, 'user/name'", lambda: projector.push_to_hub(repo_id))
    assert not there.requests


@pytest.mark.parametrize("datasets", ["us/pictures", [3]])
def test_datasets_are_a_list_of_names(there, projector, datasets):
    refused("datasets must be a list of names", lambda: projector.push_to_hub("me/mine", datasets=datasets))
    assert not there.branches


def test_a_wrong_account(there, projector):
    refused("log in with 'hf auth login', or give token=", lambda: projector.push_to_hub("me/mine", token="wrong"))
    assert not there.branches


def test_a_process_that_saves_nothing_uploads_nothing(there):
    assert hub.push(lambda folder: None, "me/mine", lambda: "card") == ""
    assert not there.branches


def test_without_a_connection_the_cache_is_taken(projector, monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "cache"):
        projector.push_to_hub("me/mine")
        SPProjector.from_pretrained("me/mine")
    no_connection(monkeypatch, tmp_path / "cache")
    assert same(SPProjector.from_pretrained("me/mine"), projector)
    assert SPProjector.from_pretrained(hub.name_or_cached_folder("me/mine")).config == CONFIG


def test_without_a_connection_one_line_says_so_at_once(projector, monkeypatch, tmp_path):
    no_connection(monkeypatch, tmp_path)
    refused(
        "me/mine is neither a folder here nor in Hugging Face's cache, and it could not be downloaded from the Hugging Face Hub: ",
        lambda: SPProjector.from_pretrained("me/mine"),
    )
    monkeypatch.setattr(SPProjector, "save_pretrained", None)  # a long save for nothing
    refused("cannot push to me/mine on the Hugging Face Hub: ", lambda: projector.push_to_hub("me/mine"))
    for name in ("me/mine", "gpt2"):
        with pytest.raises(ConnectionError, match=f"{name} is neither a folder here"):
            hub.name_or_cached_folder(name)


def test_what_is_here_or_answers_keeps_its_name(there, tmp_path):
    for name in ("me/mine", "gpt2", Path("me/mine")):
        assert hub.name_or_cached_folder(name) == name
    assert there.requests.count("HEAD /") == 3
    for name in (str(tmp_path), tmp_path, "./nowhere", "/nowhere/at/all"):
        assert hub.name_or_cached_folder(name) == name
    assert there.requests.count("HEAD /") == 3


def test_in_offline_mode_nobody_is_asked(there, projector, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("it could not be downloaded from the Hugging Face Hub: ", lambda: SPProjector.from_pretrained("me/mine"))
    refused("cannot push to me/mine on the Hugging Face Hub: ", lambda: projector.push_to_hub("me/mine"))
    assert not there.requests


def test_without_the_client(projector, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for work in (lambda: SPProjector.from_pretrained("me/mine"), lambda: projector.push_to_hub("me/mine")):
        with pytest.raises(MissingExtraError, match=r"pip install 'spatial-tokens\[hf\]'"):
            work()
