"""A LLaVA-1.5 of its parts: a language model (Llama), a vision tower (CLIP), and the MLP between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch

from spatial_tokens.adapters.huggingface.quiet import quiet_transformers
from spatial_tokens.errors import SpatialTokensError, reason
from spatial_tokens.modules import MLPHead
from spatial_tokens.storage.hub import name_or_cached_folder

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
LAYER = -2  # of the vision tower, as in the paper

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}
{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite \
answers to the user's questions. " }}
{%- endif %}
{%- for message in messages %}
{%- set content = message['content'] %}
{%- if content is string %}{% set content = [{'type': 'text', 'text': content}] %}{% endif %}
{%- set text = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}
{%- if message['role'] == 'assistant' %}
{{- 'ASSISTANT: ' + text + eos_token }}
{%- elif message['role'] == 'user' %}
{{- 'USER: ' }}
{%- for part in content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{{- text + ' ' }}
{%- else %}
{{- text + ' ' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def llava_from_parts(base: str | PathLike[str], vision: str | PathLike[str]) -> tuple[Any, Any]:
    """A LLaVA-1.5 that has seen nothing yet, where the paper's training starts: its MLP is new, as torch initializes it.

    Args:
        base: A Llama and its tokenizer, such as Vicuna: a folder, or a name on the hub.
        vision: A CLIP and its image processor.

    Returns:
        A `LlavaForConditionalGeneration` in the dtype of the base, in evaluation mode, and its `LlavaProcessor`.

    Raises:
        SpatialTokensError: If one cannot be loaded, or is of another kind.

    Examples:
        ```python
        model, processor = llava_from_parts("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336")
        model, processor = attach(model, processor, "llava-sp-cropping")
        ```
    """
    base, vision = found_base(base), found_vision(vision)
    with quiet_transformers() as transformers:
        llama = language_model(transformers, base, text_config(transformers, base))
        vision_config(transformers, vision)
        tower = vision_tower(transformers, vision, llama.dtype)
        mlp = MLPHead(tower.config.hidden_size, llama.config.hidden_size, dtype=llama.dtype)
        return assembled(transformers, llama, tower, mlp, base=base, vision=vision)


def assembled(
    transformers: Any, llama: Any, tower: Any, mlp: MLPHead, *, base: str | PathLike[str], vision: str | PathLike[str],
    layer: int = LAYER, pad: bool = True,
) -> tuple[Any, Any]:  # fmt: skip
    """The LLaVA of these parts, which are not copied, and its processor.

    Args:
        transformers: The library.
        llama: The language model.
        tower: The vision tower.
        mlp: The patches' MLP.
        base: Where the tokenizer is.
        vision: Where the image processor is.
        layer: The tower's layer whose patches are taken.
        pad: Whether pictures are padded to squares of their mean color, as LLaVA-1.5 does.
    """
    model = _llava(transformers, llama, tower, mlp, layer)
    tokenizer = _tokenizer(transformers, model, base)
    processor = transformers.LlavaProcessor(
        _image_processor(transformers, vision, pad=pad), tokenizer, patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    return model.eval(), processor


def found_base(base: str | PathLike[str]) -> str | PathLike[str]:
    """A language model, or what the cache holds of it without a connection.

    Raises:
        SpatialTokensError: If it is neither here nor in reach.
    """
    with errors_prefixed(f"cannot load the language model {base}"):
        return name_or_cached_folder(base)


def found_vision(vision: str | PathLike[str]) -> str | PathLike[str]:
    """The same of a vision tower."""
    with errors_prefixed(_tower_error(vision)):
        return name_or_cached_folder(vision)


def text_config(transformers: Any, base: str | PathLike[str]) -> Any:
    """The config of a language model.

    Raises:
        SpatialTokensError: If it is no Llama.
    """
    if os.path.isfile(os.path.join(base, "adapter_config.json")):
        raise SpatialTokensError(f"{base} is itself an adapter; give the language model that it was trained on")
    with errors_prefixed(f"cannot load the language model {base}"):
        kind = transformers.PreTrainedConfig.get_config_dict(base)[0].get("model_type")
        if kind == "llama":
            return transformers.LlamaConfig.from_pretrained(base)
    raise SpatialTokensError(f"{base} must be a Llama, such as Vicuna, got {_with_article(kind)}; give the language model alone")


def vision_config(transformers: Any, vision: str | PathLike[str]) -> Any:
    """The config of a vision tower.

    Raises:
        SpatialTokensError: If it is no CLIP.
    """
    with errors_prefixed(_tower_error(vision)):
        kind = transformers.PreTrainedConfig.get_config_dict(vision)[0].get("model_type")
        if kind in ("clip", "clip_vision_model"):
            return transformers.CLIPVisionConfig.from_pretrained(vision)
    raise SpatialTokensError(f"{_tower_error(vision)}: it must be a CLIP, got {_with_article(kind)}")


def language_model(
    transformers: Any, base: str | PathLike[str], config: Any, is_language_model_name: Callable[[str], bool] = lambda name: True
) -> Any:
    """A language model in the dtype of its files.

    Args:
        transformers: The library.
        base: Where it is.
        config: Its config.
        is_language_model_name: Which of the files' names are a language model's; the others are skipped.

    Raises:
        SpatialTokensError: If it cannot be loaded, or its tensors are not exactly a Llama's.
    """
    with errors_prefixed(f"cannot load the language model {base}"):
        model, info = transformers.LlamaForCausalLM.from_pretrained(base, config=config, dtype="auto", output_loading_info=True)
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(name for name in info["unexpected_keys"] if is_language_model_name(name)),
    }
    if found := [f"{kind}: {', '.join(names[:20])}" for kind, names in faults.items() if names]:
        raise SpatialTokensError(f"the tensors of {base} are not a Llama's: {'; '.join(found)}")
    return model


def vision_tower(transformers: Any, vision: str | PathLike[str], dtype: torch.dtype) -> Any:
    """A vision tower.

    Raises:
        SpatialTokensError: If it cannot be loaded, or not all of it is there.
    """
    with errors_prefixed(_tower_error(vision)):
        tower, info = transformers.CLIPVisionModel.from_pretrained(vision, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise SpatialTokensError(f"{_tower_error(vision)}: missing: {', '.join(sorted(info['missing_keys'])[:20])}")
    return tower


def _llava(transformers: Any, llama: Any, tower: Any, mlp: MLPHead, layer: int) -> Any:
    side = tower.config.image_size // tower.config.patch_size
    config = transformers.LlavaConfig(
        text_config=llama.config, vision_config=tower.config, image_seq_length=side**2,
        vision_feature_layer=layer, vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    linears = {"linear_1": mlp.fc1, "linear_2": mlp.fc2}
    tensors = {f"{name}.{kind}": each for name, linear in linears.items() for kind, each in linear.state_dict().items()}
    model.model.multi_modal_projector.load_state_dict(tensors, assign=True)
    model.model.language_model, model.lm_head, model.model.vision_tower = llama.model, llama.lm_head, tower
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=llama.generation_config.bos_token_id, eos_token_id=llama.generation_config.eos_token_id
    )
    return model


def _tokenizer(transformers: Any, model: Any, base: str | PathLike[str]) -> Any:
    """The base's tokenizer with a token for images, and one for padding if it has none; the model gains rows for them."""
    with errors_prefixed(f"cannot load the tokenizer of {base}"):
        if os.path.isdir(base) and not any(os.path.isfile(os.path.join(base, name)) for name in TOKENIZERS):
            raise FileNotFoundError(f"the folder has no {' or '.join(TOKENIZERS)}")  # transformers 5.0 would make one of no words
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.add_tokens([transformers.AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        head = model.lm_head.weight
        if head is not model.get_input_embeddings().weight:
            with torch.no_grad():  # a logit that is the mean of all is never the largest
                head[rows:] = head[:rows].mean(0, dtype=torch.float32)
    return tokenizer


def _image_processor(transformers: Any, vision: str | PathLike[str], *, pad: bool) -> Any:
    """CLIP's own; where the released model pads pictures to squares of the mean color first, LLaVA's with CLIP's values."""
    with errors_prefixed(f"cannot load the image processor of {vision}"):
        if pad:
            return transformers.LlavaImageProcessor.from_pretrained(vision, do_pad=True)
        return transformers.CLIPImageProcessor.from_pretrained(vision)


def _with_article(kind: str | None) -> str:
    return "no model" if kind is None else f"a {kind}"


def _tower_error(vision: str | PathLike[str]) -> str:
    return f"cannot load the vision tower {vision} (vision= or --vision gives another)"


@contextmanager
def errors_prefixed(what: str) -> Iterator[None]:
    """Makes another library's error one of ours."""
    try:
        yield
    except SpatialTokensError:
        raise
    except Exception as error:  # what transformers raises depends on what is wrong with the files, and on its version
        raise SpatialTokensError(f"{what}: {reason(error)}") from error
