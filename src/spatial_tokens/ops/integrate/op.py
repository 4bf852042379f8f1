"""`integrate` as a registered operator: it decomposes into torch's own, which give its gradients and let a compiler fuse it."""

from collections.abc import Sequence

import torch

from spatial_tokens.ops.backends import Backend, resolve
from spatial_tokens.ops.dense import check_dense
from spatial_tokens.ops.integrate import gemm, naive

torch.library.define(
    "spatial_tokens::integrate",
    "(Tensor spatial_tokens, Tensor detail, Tensor[] query, Tensor[] key, Tensor[] value, float[] eps) -> (Tensor, Tensor)",
)
torch.library.impl("spatial_tokens::integrate", "CompositeImplicitAutograd", gemm.integrate)


def integrate(
    spatial_tokens: torch.Tensor,
    detail: torch.Tensor,
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    *,
    eps: Sequence[float] = (1e-5, 1e-5, 1e-5),
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spatial tokens look up details by cross-attention of one head, and keep what they find beside themselves.

    Args:
        spatial_tokens: `(B, K, S)`.
        detail: `(B, P, S)`.
        query: Its LayerNorm's weight and bias `(S,)`, its Linear's weight `(S, S)` and bias `(S,)`.
        key: The same for the keys.
        value: The same for the values.
        eps: Of the three LayerNorms.
        backend: "naive", "gemm" or "auto"; there is no Triton kernel (README.md says why), and "triton" is "gemm" here.

    Returns:
        Tokens `(B, K, 2S)` and the attention `(B, K, P)`.

    Raises:
        SpatialTokensError: If an input is no dense tensor of three dimensions, or the named backend cannot run here.
    """
    check_dense(spatial_tokens, "spatial tokens", "(B, K, S)", 3)
    check_dense(detail, "the detail map", "(B, P, S)", 3)
    if resolve(backend, detail) == "naive":
        return naive.integrate(spatial_tokens, detail, query, key, value, list(eps))
    tokens, attention = torch.ops.spatial_tokens.integrate(spatial_tokens, detail, query, key, value, list(eps))
    return tokens, attention
