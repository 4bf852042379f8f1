"""The named configs, as plain data: the fields of an `SPProjectorConfig` each.

Sources: the paper (LLaVA-SP), its tables as named below, and the released checkpoints.
"""

from typing import Any

_LLAVA = {"vision_hidden_size": 1024, "text_hidden_size": 4096, "grid_size": (24, 24), "spatial_hidden_size": 512}
_SIX = {"kernel_sizes": (4, 8, 12, 16, 20, 24)}
_DETAIL = {"detail_kernel_size": 16}
_NO_DETAIL = {"detail_kernel_size": None}
_FACTORIZED = {"rank": 128}

PRESETS: dict[str, dict[str, Any]] = {
    # The released models. Their spatial head is GELU + Linear; only cropping's has a bias.
    "llava-sp-cropping": {**_LLAVA, **_SIX, **_DETAIL, "variant": "cropping", "spatial_head": "linear"},
    "llava-sp-pooling": {
        **_LLAVA, **_SIX, **_NO_DETAIL, "variant": "pooling", "spatial_head": "linear", "spatial_head_bias": False
    },
    # Table 6, last row: pooling with the DetailFeatureIntegrator. The authors' code has it, no checkpoint was released.
    "llava-sp-pooling-dfi": {
        **_LLAVA, **_SIX, **_DETAIL, "variant": "pooling", "spatial_head": "linear", "spatial_head_bias": False
    },
    # Table 4: SFE cropping alone, inward strides none, 4 and 1.
    "llava-sp-1-token": {**_LLAVA, **_NO_DETAIL, "variant": "cropping", "kernel_sizes": (24,)},
    "llava-sp-3-tokens": {**_LLAVA, **_NO_DETAIL, "variant": "cropping", "kernel_sizes": (8, 16, 24)},
    "llava-sp-12-tokens": {**_LLAVA, **_NO_DETAIL, "variant": "cropping", "kernel_sizes": tuple(range(2, 25, 2))},
    # Table 7: Vicuna-7B behind SigLIP-L/16-384 (24 x 24 patches, no class token).
    "siglip-l-16-384": {**_LLAVA, **_SIX, **_DETAIL, "variant": "cropping"},
    # Table 7: Qwen2-0.5B behind InternViT-300M-448, on its 32 x 32 patches before they are merged. The paper does not give the
    # kernel sizes: these are the six largest of stride 2.
    "internvit-300m-448": {
        **_LLAVA, **_DETAIL, "variant": "cropping", "text_hidden_size": 896, "grid_size": (32, 32),
        "kernel_sizes": (12, 16, 20, 24, 28, 32),
    },
    # Factorized kernels in the paper's setting: 1/200 of the parameters, not in the paper. Windows are shares of the picture, so
    # that these read patches of every grid: attach() gives them to models of any image size.
    "factorized-cropping": {**_LLAVA, **_SIX, **_DETAIL, **_FACTORIZED, "variant": "cropping"},
    "factorized-pooling": {**_LLAVA, **_SIX, **_DETAIL, **_FACTORIZED, "variant": "pooling"},
    # SigLIP-so400m/14-384, whose 27 x 27 patches of 1152 channels LLaVA-OneVision and others read.
    "factorized-siglip-so400m": {
        **_LLAVA, **_DETAIL, "variant": "cropping", "vision_hidden_size": 1152, "grid_size": (27, 27),
        "kernel_sizes": (7, 11, 15, 19, 23, 27), "rank": 144,
    },
    # Qwen2.5-VL-7B: patches of any grid, 1280 channels.
    "factorized-qwen2.5-vl": {
        **_LLAVA, **_SIX, **_DETAIL, "variant": "cropping", "vision_hidden_size": 1280, "text_hidden_size": 3584, "rank": 160,
        "patch_head": None,
    },
}  # fmt: skip


def list_presets() -> tuple[str, ...]:
    """The names of the presets, for `SPProjectorConfig.from_preset` and `attach`.

    Examples:
        >>> list_presets()[:2]
        ('llava-sp-cropping', 'llava-sp-pooling')
    """
    return tuple(PRESETS)
