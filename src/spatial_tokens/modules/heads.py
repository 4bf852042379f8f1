"""The heads that carry features into the language model's space (LLaVA-SP, figure 2)."""

import torch
from torch import nn

from spatial_tokens.checks import check_bool
from spatial_tokens.grid import check_positive
from spatial_tokens.modules.initialization import checked_factory
from spatial_tokens.modules.inputs import check_features


class MLPHead(nn.Module):
    """Linear, GELU, Linear: the paper's two parallel MLPs, and LLaVA-1.5's own projector.

    Args:
        in_features: Channels of the input.
        out_features: Width `D` of the language model, and of the layer between.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(..., in_features)`.
        - Output: `(..., out_features)`.

    Raises:
        SpatialTokensError: At construction if a width is not positive; in `forward` if the input does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        factory = checked_factory(device, dtype)
        self.fc1 = nn.Linear(in_features, out_features, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(out_features, out_features, **factory)

    def reset_parameters(self) -> None:
        """Initializes both layers as torch does."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        check_features(features, self.in_features, self.fc1, "features", "(..., in_features)")
        return self.fc2(self.act(self.fc1(features)))  # type: ignore[no-any-return]


class LinearHead(nn.Module):
    """GELU, Linear: the spatial head of the released models.

    Args:
        in_features: Channels of the input.
        out_features: Width `D` of the language model.
        bias: Whether the layer has one; the released pooling model's has none.
        device: Where the parameters are made.
        dtype: Their dtype.

    Shape:
        - Input: `(..., in_features)`.
        - Output: `(..., out_features)`.

    Raises:
        SpatialTokensError: At construction if a width is not positive; in `forward` if the input does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features)
        check_bool(bias=bias)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.act = nn.GELU()
        self.fc = nn.Linear(in_features, out_features, bias=bias, **checked_factory(device, dtype))

    def reset_parameters(self) -> None:
        """Initializes the layer as torch does."""
        self.fc.reset_parameters()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        check_features(features, self.in_features, self.fc, "features", "(..., in_features)")
        return self.fc(self.act(features))  # type: ignore[no-any-return]
