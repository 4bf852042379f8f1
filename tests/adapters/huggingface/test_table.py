"""The table of families in the docs is the one that the tests tell, and every family of transformers is in it."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from spatial_tokens.adapters.huggingface import attach, list_families
from spatial_tokens.adapters.huggingface.families import FAMILIES, REFUSED, TESTED
from spatial_tokens.errors import SpatialTokensError
from tests.adapters.huggingface.exceptions import EXCEPTIONS, FAULTS
from tests.adapters.huggingface.table import CANNOT, NOT_TRIED, PAGE, families, page
from tests.adapters.huggingface.tiny import MODELS, needs_known_transformers

pytestmark = needs_known_transformers


def test_it_is_written():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.adapters.huggingface.table"


def test_every_family_of_transformers_is_in_it():
    assert set(MAPPING) <= set(families())


def test_the_tested_families_are_listed():
    assert sorted(TESTED) == sorted({tiny.family for tiny in MODELS.values()})
    assert list_families().keys() == set(TESTED)


def test_a_family_is_in_one_state():
    tried = {tiny.family for tiny in MODELS.values()}
    states = [*tried, *REFUSED, *CANNOT, *NOT_TRIED]
    assert len(states) == len(set(states))


def test_exceptions_are_of_models_that_there_are():
    assert {name for name, _ in (*EXCEPTIONS, *FAULTS)} <= set(MODELS)


def test_what_is_known_of_a_family_is_tested():
    towers = {"pixtral"}  # of llava models
    assert FAMILIES.keys() - towers <= {tiny.family for tiny in MODELS.values()}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    model = nn.Module()
    model.config = transformers.PretrainedConfig()
    model.config.model_type = kind
    with pytest.raises(SpatialTokensError, match=f"cannot be attached to {kind}: "):
        attach(model)


@pytest.mark.parametrize("kind", CANNOT)
def test_refused_for_what_is_not_found(kind):
    if kind not in MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    try:
        config = transformers.CONFIG_MAPPING[kind]()
    except ValueError as error:
        pytest.skip(f"{kind} has no config of its own: {error}")
    with torch.device("meta"):
        model = getattr(transformers, MAPPING[kind])(config)
    with pytest.raises(SpatialTokensError, match=r"has no get_image_features|found no projector|has no image_token_id"):
        attach(model)
