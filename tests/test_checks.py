from pathlib import Path

import numpy as np
import pytest

from spatial_tokens import SpatialTokensError
from spatial_tokens.checks import as_path, check_bool, check_choice, check_seed
from spatial_tokens.errors import on_one_line, shown


@pytest.mark.parametrize("value", ["a/b", Path("a/b")])
def test_paths(value):
    assert as_path(value, "folder") == Path("a/b")


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"], np.array("a"), ""])
def test_what_is_no_path(value):
    with pytest.raises(SpatialTokensError, match=r"^folder must be a path, got "):
        as_path(value, "folder")


@pytest.mark.parametrize("value", ["c", None, 0, ["a"], np.array("a"), np.array(["a", "b"])], ids=repr)
def test_choices(value):
    check_choice("variant", "b", ("a", "b"))
    with pytest.raises(SpatialTokensError, match=r"^variant must be 'a' or 'b', got "):
        check_choice("variant", value, ("a", "b"))


def test_a_choice_may_be_none():
    check_choice("head", None, ("mlp", None))
    with pytest.raises(SpatialTokensError, match=r"^head must be 'mlp' or None, got 'None'$"):
        check_choice("head", "None", ("mlp", None))


@pytest.mark.parametrize("value", [0, 1, None, "True", np.array([True, False])], ids=repr)
def test_bools(value):
    check_bool(bias=True)
    with pytest.raises(SpatialTokensError, match=r"^bias must be True or False, got "):
        check_bool(bias=value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 1.0, True, "1", None])
def test_seeds(value):
    for seed in (-(2**63), 0, 2**64 - 1):
        check_seed(seed)
    with pytest.raises(SpatialTokensError, match=r"^seed must be an integer from -2\*\*63 to 2\*\*64 - 1, got "):
        check_seed(value)


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


def test_values_are_shown_on_one_short_line():
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert len(shown("a" * 1000)) == 203
    assert shown(Unprintable()) == "a Unprintable that cannot be printed"


def test_control_characters_are_escaped():
    assert on_one_line("a\nb\x1b\0é") == r"a\nb\x1b\x00é"
