"""Operations on tensors and integers: they know no config and no module."""
