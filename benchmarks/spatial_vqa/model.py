"""The vision-language model: LLaVA, of the frozen encoder, a new MLP and the language model."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.spatial_vqa import encoder
from benchmarks.spatial_vqa.language_model import LanguageModel
from spatial_tokens.demo.scenes import SIDE


class Tower(nn.Module):
    """The encoder as LLaVA's vision tower. Features that were computed before pass as they are: the encoder is frozen."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutputWithPooling:
        """Pixels `(B, 3, H, W)`, or their features `(B, 1 + N, C)`."""
        features = pixel_values if pixel_values.ndim == 3 else encoder.features_of(self.vit, pixel_values)
        return BaseModelOutputWithPooling(hidden_states=(features, None))  # the last but one is read, and no other


def build_llava(vit: VisionTransformer, language: LanguageModel) -> LlavaForConditionalGeneration:
    """LLaVA with the encoder's weights, the language model's, and an MLP of random ones."""
    vision = {
        "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": encoder.PATCH, "hidden_size": encoder.HIDDEN_SIZE,
        "intermediate_size": encoder.HIDDEN_SIZE, "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language.config, image_token_id=language.tokens.image, vision_feature_layer=encoder.LAYER,
        vision_feature_select_strategy="default", tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = Tower(vit)
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): each for name, each in language.weights.items() if name.startswith("model.")}
    )
    model.tie_weights()
    return model
