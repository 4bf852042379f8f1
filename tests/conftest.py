import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("spatial-tokens", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("spatial-tokens")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
