import json
import shutil

import pytest

from spatial_tokens import SpatialTokensError
from spatial_tokens.training.checkpoints import MANIFEST, check_complete, checkpoints_in, last_complete, mark_complete


@pytest.fixture
def output(tmp_path):
    """Three whole checkpoints."""
    for step in (5, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "spatial_tokens").mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(bytes(range(step)))
        (folder / "spatial_tokens" / "weights").write_bytes(b"w" * step)
        mark_complete(folder)
    return tmp_path


def test_the_newest_whole_one_by_its_step_is_taken(output, recwarn):
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert last_complete(output).name == "checkpoint-100"
    assert not recwarn.list


def damage(name):
    return {
        "no manifest": lambda folder: (folder / MANIFEST).unlink(),
        "half a manifest": lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:30]),
        "no files": lambda folder: (folder / MANIFEST).write_text(json.dumps({"files": {}})),
        "another manifest": lambda folder: (folder / MANIFEST).write_text(json.dumps({"files": [1, 2]})),
        "missing": lambda folder: (folder / "optimizer.pt").unlink(),
        "cut": lambda folder: (folder / "optimizer.pt").write_bytes(bytes(range(50))),
        "one bit": lambda folder: (folder / "spatial_tokens" / "weights").write_bytes(b"w" * 99 + b"v"),
        "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [("no manifest", "was not written to its end"), ("half a manifest", "cannot be read"), ("another manifest", "cannot be read"),
     ("missing", "optimizer.pt cannot be read"), ("cut", "has 50 bytes, 100 were written"), ("one bit", "weights is damaged"),
     ("empty", "was not written to its end"), ("no files", "lists no files: it is not of a complete checkpoint")],
)  # fmt: skip
def test_a_damaged_one_is_named_and_passed_over(output, name, said):
    damage(name)(output / "checkpoint-100")
    with pytest.raises(SpatialTokensError, match=said):
        check_complete(output / "checkpoint-100")
    with pytest.warns(UserWarning, match=f"skipped a checkpoint.*{said}"):
        assert last_complete(output).name == "checkpoint-10"


def test_none_is_left(output):
    for folder in checkpoints_in(output):
        (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="skipped"):
        assert last_complete(output) is None
    assert last_complete(output / "nowhere") is None


def test_other_names_are_no_checkpoints(output):
    (output / "checkpoint-best").mkdir()
    (output / "checkpoint-100.tmp").mkdir()
    assert last_complete(output).name == "checkpoint-100"


def test_a_checkpoint_of_nothing_is_none(tmp_path):
    with pytest.raises(SpatialTokensError, match="holds no files; write the checkpoint first"):
        mark_complete(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_a_file(tmp_path):
    (tmp_path / "empty").touch()
    mark_complete(tmp_path)
    check_complete(tmp_path)
