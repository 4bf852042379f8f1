"""The shipped model's files, as transformers and `load_adapter` read them, and what is pinned of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.spatial_vqa import encoder
from benchmarks.spatial_vqa.encoder import as_pixels
from benchmarks.spatial_vqa.language_model import llama_config
from benchmarks.spatial_vqa.splits import Example, pictures
from benchmarks.spatial_vqa.words import END, IDS, IMAGE, PAD, START, WORDS, questions_of
from spatial_tokens.adapters.huggingface import attach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.ready import trained_llava
from spatial_tokens.adapters.huggingface.rolled_vit import RolledViTConfig
from spatial_tokens.bench.machine import describe
from spatial_tokens.demo.scenes import COLORS, SHAPES, SIDE
from spatial_tokens.storage.files import make_directory, write_text

TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def write(folder: Path, trained: Any, facts: dict[str, Any]) -> None:
    """Writes base and adapter in float16, and `trained.json` beside them."""
    make_directory(folder)
    base = _base(trained)
    base.half().save_pretrained(folder / "base")
    processor().save_pretrained(folder / "base")
    base.config._name_or_path = ""  # an adapter's base has no name beyond this machine
    attach(base, None, trained.spatial_tokens.half())
    save_adapter(base, folder / "adapter")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # a wheel keeps modes
    write_text(folder / "trained.json", json.dumps({**facts, "checksums": checksums(folder)}, indent=2) + "\n")


def measure(
    folder: Path, examples: list[Example], count_right: Callable[[Any, torch.Tensor, Sequence[Any], bool], dict[str, list[int]]]
) -> None:
    """Adds to `trained.json` what the files answer, without the spatial tokens and with them, and where it was measured."""
    model, _ = load_adapter(trained_llava(folder)[0], folder / "adapter")
    pixels = as_pixels(torch.from_numpy(pictures(examples)))
    asked = [questions_of(each.questions) for each in examples]
    found = {name: count_right(model, pixels, asked, spatial) for name, spatial in (("without", False), ("with", True))}
    facts = json.loads((folder / "trained.json").read_text("utf-8"))
    facts |= {"test": found, "machine": describe(torch.device("cpu")), "date": date.today().isoformat()}
    write_text(folder / "trained.json", json.dumps(facts, indent=2) + "\n")
    print(json.dumps(found))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def processor() -> LlavaProcessor:
    """Pictures of 96 x 96 pixels, and the benchmark's words: "Is the red circle ...?" is read as "is the red-circle ... ?"."""
    words = Tokenizer(models.WordLevel(IDS))
    names = [normalizers.Replace(f"{color} {shape}", f"{color}-{shape}") for color, shape in product(COLORS, SHAPES)]
    plurals = [normalizers.Replace(f"-{shape}s", f" {shape}s") for shape in SHAPES]
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), *names, *plurals, normalizers.Replace(Regex(r"\s*\?"), " ?")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, IDS[START])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=START, eos_token=END, extra_special_tokens={"image_token": IMAGE},
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=encoder.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def llava_config() -> LlavaConfig:
    """The model's, without spatial tokens."""
    text = llama_config()
    text.bos_token_id, text.eos_token_id, text.pad_token_id = IDS[START], IDS[END], IDS[PAD]
    return LlavaConfig(
        vision_config=RolledViTConfig(), text_config=text, image_token_id=IDS[IMAGE], vision_feature_layer=encoder.LAYER,
        vision_feature_select_strategy="default", tie_word_embeddings=True, image_seq_length=(SIDE // encoder.PATCH) ** 2,
    )  # fmt: skip


def _base(trained: Any) -> LlavaForConditionalGeneration:
    """The model without its spatial tokens, in transformers' own parts; LoRA is merged."""
    for layer in trained.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
    words = {
        name.replace(".base_layer", ""): each
        for name, each in trained.model.language_model.state_dict().items()
        if ".lora_" not in name
    }
    base = LlavaForConditionalGeneration(llava_config())
    vit = trained.model.vision_tower.vit.state_dict()
    base.model.vision_tower.load_state_dict({name: each for name, each in vit.items() if not name.startswith("norm.")})
    base.model.language_model.load_state_dict(words)
    base.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    base.tie_weights()
    base.generation_config = GenerationConfig(bos_token_id=IDS[START], eos_token_id=IDS[END], pad_token_id=IDS[PAD])
    assert len(WORDS) == base.config.text_config.vocab_size
    return base.eval()
