import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens.modules import LinearHead, MLPHead
from tests import reference
from tests.modules.checks import assert_equals_reference, batches, features, widths
from tests.tolerances import FLOAT64

HEADS = {"mlp": MLPHead, "linear": LinearHead, "linear without bias": lambda c, d, **dd: LinearHead(c, d, bias=False, **dd)}


@given(data=st.data(), kind=st.sampled_from(list(HEADS)), batch=batches, positions=st.integers(0, 4), c=widths, d=widths)
def test_a_head_equals_its_layers_by_hand(data, kind, batch, positions, c, d):
    head = HEADS[kind](c, d, dtype=torch.float64)
    assert_equals_reference(head, reference.head, data.draw(features(batch, positions, c)), tolerance=FLOAT64)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_takes_any_leading_dimensions(kind):
    head, x = HEADS[kind](4, 3), torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(head(x)[1, 2, 3], head(x[1, 2, 3]))


def test_the_layers_of_each_head():
    assert list(MLPHead(4, 3).state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert list(LinearHead(4, 3).state_dict()) == ["fc.weight", "fc.bias"]
    assert list(LinearHead(4, 3, bias=False).state_dict()) == ["fc.weight"]
