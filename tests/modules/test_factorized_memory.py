"""What factorized kernels keep for the backward pass: the caller's features as they are, and nothing else of their size."""

import pytest
import torch

from spatial_tokens import FactorizedFeatureExtractor


@pytest.mark.parametrize("spatial_basis", ["cosine", "learned"])
@pytest.mark.parametrize("trained_encoder", [False, True])
def test_no_copy_of_the_features_is_kept(spatial_basis, trained_encoder):
    extractor = FactorizedFeatureExtractor(64, 8, grid_size=12, kernel_sizes=(4, 12), rank=48, spatial_basis=spatial_basis)
    patches = torch.randn(3, 144, 64, requires_grad=trained_encoder)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        tokens = extractor(patches)
    own = {patches.data_ptr(), *(parameter.data_ptr() for parameter in extractor.parameters())}
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept if tensor.data_ptr() not in own]
    assert sum(sizes) < patches.nbytes / 2
    tokens.sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())
