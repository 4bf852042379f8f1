"""What is specific to each family of transformers' vision-language models, as data: where patch features pass, and their layout.

A family that is not here is `GENERAL`: the first of `PROJECTORS` that its model has, square maps of patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal[
    "square", "class token", "channels first", "side by side", "image sizes", "target sizes", "positions",
    "grid", "grid of blocks", "grid of windows", "merged grid", "padded", "pooled grid",
]  # fmt: skip
Tiles = Literal["first", "last", "anyres"]


@dataclass(frozen=True)
class Family:
    """Where to look in a model of one `model_type`.

    Args:
        projector: The module, by its path below the base model, whose input is the patch features; "" to try `PROJECTORS`.
        layout: How a map's patches lie in that input.
        tiles: Where an image's thumbnail is among its tiles, if it is cut into tiles; "anyres": first, and `image_sizes` tells
            how many tiles follow.
        image_mode: Whether spatial tokens can ride among the image tokens (`mode="image"`).
        joined: Whether features of several patches or layers are already joined in the projector's channels.
        reduced: By how much the encoder itself makes the patch grid smaller, along a side.
        own_generate: Whether its `generate` encodes images without `get_image_features`.
    """

    projector: str = ""
    layout: Layout = "square"
    tiles: Tiles | None = None
    image_mode: bool = True
    joined: bool = False
    reduced: int = 1
    own_generate: bool = False


PROJECTORS = (
    "multi_modal_projector", "visual.merger", "vision_tower.merger", "merger", "connector", "aligner", "projector",
    "vision_projection", "embed_vision", "model.multi_modal_projector", "vision_model.vision_adapter",
)  # fmt: skip

GENERAL = Family()

FAMILIES: dict[str, Family] = {
    "aya_vision": Family(tiles="last"),
    "blip-2": Family("qformer", "class token", image_mode=False, own_generate=True),
    "cohere2_vision": Family(tiles="last"),
    "cohere_compass": Family("visual.merger", "grid of blocks"),
    "cosmos3_edge": Family("projector", "grid of blocks"),
    "cosmos3_omni": Family("visual.merger", "grid of blocks"),
    "dots3_note": Family("vision_tower.merger", "grid of blocks"),
    "ernie4_5_vl_moe": Family("resampler_model", "grid of blocks"),
    "exaone4_5": Family("visual.merger", "grid of windows"),
    "florence2": Family(layout="channels first"),
    "gemma4": Family("embed_vision", "positions"),
    "glm46v": Family("visual.merger", "merged grid"),
    "glm4v": Family("visual.merger", "merged grid"),
    "glm4v_moe": Family("visual.merger", "merged grid"),
    "glm5_next": Family("visual.merger", "merged grid"),
    "glm_ocr": Family("visual.merger", "merged grid"),
    "glmga": Family("visual.merger", "merged grid"),
    "got_ocr2": Family(layout="channels first"),
    "hyperclovax_vision_v2": Family("projector", "merged grid"),
    "idefics2": Family("connector", "padded", tiles="last", image_mode=False),
    "idefics3": Family("connector", tiles="last", image_mode=False),
    "inkling2": Family("vision_tower.merger", "grid", joined=True),
    "instructblip": Family("qformer", "class token"),
    "internvl": Family(tiles="last", joined=True),
    "kimi_k25": Family("mm_projector", "grid of blocks"),
    "lfm2_vl": Family(layout="side by side"),
    "lfm3_vl": Family(layout="grid of blocks"),
    "lighton_ocr": Family("vision_projection", "image sizes"),
    "llama4": Family("vision_model.vision_adapter", tiles="last", image_mode=False),
    "llava_next": Family(tiles="anyres"),
    "llava_next_video": Family(tiles="anyres"),
    "llava_onevision": Family(tiles="anyres"),
    "minicpm_ocr": Family("merger", "target sizes"),
    "minicpmv4_6": Family("merger", "target sizes"),
    "minicpmv4_7": Family("merger", "target sizes"),
    "minimax_m3_vl": Family(layout="grid of blocks"),
    "mistral3": Family(layout="image sizes"),
    "mistral_large4": Family(layout="image sizes"),
    "muse_glimmer": Family("vision_adapter", "merged grid", joined=True),
    "muse_spark": Family("vision_adapter", "merged grid", joined=True),
    "ovis2": Family("vision_tower.head_linear", joined=True),
    "paddleocr_vl": Family("projector", "grid"),
    "perception_lm": Family(tiles="first"),
    "pixtral": Family(layout="image sizes"),  # the tower of some llava models
    "pp_chart2table": Family(layout="channels first"),
    "qianfan_ocr": Family(tiles="last", joined=True),
    "qwen2_5_omni_thinker": Family("visual.merger", "grid of windows", image_mode=False),
    "qwen2_5_vl": Family("visual.merger", "grid of windows"),
    "qwen2_vl": Family("visual.merger", "grid of blocks"),
    "qwen3_5": Family("visual.merger", "grid of blocks"),
    "qwen3_5_moe": Family("visual.merger", "grid of blocks"),
    "qwen3_omni_moe_thinker": Family("visual.merger", "grid of blocks"),
    "qwen3_vl": Family("visual.merger", "grid of blocks"),
    "qwen3_vl_moe": Family("visual.merger", "grid of blocks"),
    "qwen4_exp": Family("visual.merger", "grid of blocks"),
    "smolvlm": Family("connector", tiles="last", image_mode=False),
    "step3p7": Family(joined=True, reduced=2),
    "video_llama_3": Family("projector", "pooled grid"),
    "vipllava": Family(joined=True),
}

REFUSED: dict[str, str] = {
    "chameleon": "its images are discrete codes: there are no continuous patch features",
    "deepseek_ocr2": "its encoder gives what its queries gathered: there is no map of patches",
    "emu3": "its images are discrete codes: there are no continuous patch features",
    "fuyu": "it has no vision tower: raw patches go straight into the language model",
    "gemma4_unified": "it has no vision tower: raw patches go straight into the language model",
    "git": "its images are put before the text inside the model, without placeholders",
    "idefics": "its images are looked at by gated cross-attention and have no place in the sequence",
    "kosmos-2": "it encodes images in its own forward, and its language model is given token ids",
    "kosmos-2.5": "it encodes images in its own forward, and its language model is given token ids",
    "mllama": "its images are looked at by cross-attention and have no place in the sequence",
}

# Those that the tests run on a tiny model; docs/families.md says what each can do.
TESTED = (
    "aria", "aya_vision", "blip-2", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "dots3_note", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "florence2", "gemma3", "gemma3n",
    "gemma4", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "got_ocr2", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "inkling2", "instructblip", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr",
    "llama4", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
    "minimax_m3_vl", "mistral3", "mistral_large4", "muse_glimmer", "muse_spark", "ovis2", "paddleocr_vl", "paligemma",
    "perception_lm", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "shieldgemma2", "smolvlm", "step3p7",
    "video_llama_3", "video_llava", "vipllava",
)  # fmt: skip


def list_families() -> dict[str, Family]:
    """The families of models that spatial tokens have been tested in, by `model.config.model_type`, and what is known of each.

    Examples:
        >>> families = list_families()
        >>> "llava" in families, families["qwen2_5_vl"].layout, "mllama" in families
        (True, 'grid of windows', False)
    """
    return {name: FAMILIES.get(name, GENERAL) for name in TESTED}
