"""Processors that insert placeholders: texts and chat templates, batches, tiles; and what is left of them on disk."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach, insert_placeholders, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.adapters.huggingface.processing import TOKEN
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen

SLOTS = "<|spatial|>" * 6
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
)


@pytest.fixture(scope="module")
def attached():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    return model, processor, plain


def words(processor, ids):
    """The text behind ids, without the tokenizer's spaces, and runs of image tokens as one."""
    text = "".join(processor.tokenizer.convert_ids_to_tokens(ids)).replace("<pad>", "")
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


def test_one_image(attached):
    _, processor, plain = attached
    (image,) = pictures(1)
    made = processor(images=image, text="a <image> b", return_tensors="pt")
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"
    before = plain(images=image, text="a <image> b", return_tensors="pt")
    assert torch.equal(made["pixel_values"], before["pixel_values"])
    assert made["input_ids"].shape[1] == before["input_ids"].shape[1] + 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch(attached, side):
    model, processor, plain = attached
    texts = ["<image> a <image> b", "only words", "<image> c"]
    made = processor(images=pictures(3), text=texts, return_tensors="pt", padding=True, padding_side=side)
    expected = [f"{SLOTS}<image> a {SLOTS}<image> b", "only words", f"{SLOTS}<image> c"]
    assert [words(processor, row) for row in made["input_ids"]] == expected
    slots = made["input_ids"] == attachment_of(model).token_id
    assert slots.sum(1).tolist() == [12, 0, 6]
    assert (made["attention_mask"][slots] == 1).all()
    edge = 0 if side == "left" else -1
    assert made["attention_mask"][1, edge] == 0
    before = plain(images=pictures(3), text=texts, return_tensors="pt", padding=True, padding_side=side)
    kept = made["attention_mask"].bool() & ~slots
    assert torch.equal(made["input_ids"][kept], before["input_ids"][before["attention_mask"].bool()])


def test_lists_without_tensors(attached):
    _, processor, _ = attached
    made = processor(images=pictures(1), text=["a <image> b"])
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"


def test_images_as_one_tensor(attached):
    _, processor, _ = attached
    made = processor(images=torch.zeros(2, 3, 336, 336), text="<image> a <image>", return_tensors="pt")
    assert words(processor, made["input_ids"][0]) == f"{SLOTS}<image> a {SLOTS}<image>"


def test_text_alone_and_images_alone(attached):
    _, processor, plain = attached
    assert processor(text="a b")["input_ids"] == plain(text="a b")["input_ids"]
    assert processor(text=["a b"], images=None)["input_ids"] == plain(text=["a b"])["input_ids"]


@pytest.mark.parametrize("text", ["<|spatial|><image> b", f"{SLOTS}<image> b", "<image> what is <|spatial|>?"])
def test_the_users_own_words_mark_no_places(attached, text):
    _, processor, _ = attached
    with pytest.raises(SpatialTokensError, match=r"text 0 holds .*, which marks the places of spatial tokens; leave it out"):
        processor(images=pictures(1), text=text)
    with pytest.raises(SpatialTokensError, match="text 1 holds"):
        processor(images=None, text=["a", text.replace("<image>", "")])


def test_the_users_own_words_in_image_mode():
    """They are words, as they are to the plain processor."""
    base, plain = llava()
    _, processor = attach(base, plain, mode="image", **FIELDS)
    text = "<image> what is <|spatial|>?"
    made, before = (each(images=pictures(1), text=text)["input_ids"][0] for each in (processor, plain))
    assert made == [base.config.image_token_id] * 6 + before


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> a"], 2, r"the texts have <image> \[1\] times, for 2 images in all"),
        (["<image> a", "<image> b"], 1, r"the texts have <image> \[1, 1\] times, for 1 images in all"),
        (["<image> a"], 0, r"the texts have <image> \[1\] times, for 0 images in all"),
        (["<image> a", "b"], [0, 1], "text 0 has <image> 1 times for 0 images"),
    ],
)
def test_counts_that_do_not_go_together(attached, texts, images, message):
    _, processor, _ = attached
    given = [pictures(n) for n in images] if isinstance(images, list) else pictures(images) or None
    with pytest.raises(SpatialTokensError, match=message):
        processor(images=given, text=texts, return_tensors="pt")


def test_images_without_a_place(attached):
    _, processor, _ = attached
    with pytest.raises(ValueError, match="<image>"):  # ours, or that of a transformers that counts itself
        processor(images=pictures(1), text=["a"], return_tensors="pt")


def test_what_is_no_text(attached):
    _, processor, _ = attached
    with pytest.raises(SpatialTokensError, match="text must be a string or a list of strings"):
        processor(images=pictures(1), text=[["a", "<image>"]])


def test_chat_template(attached):
    _, processor, _ = attached
    processor = copy.deepcopy(processor)
    processor.chat_template = TEMPLATE
    content = [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "What?"}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert words(processor, made["input_ids"][0]).strip() == f"user: {SLOTS}<image>What?"


def test_several_turns_and_rows_of_conversation(attached):
    model, processor, _ = attached
    processor = copy.deepcopy(processor)
    processor.chat_template = TEMPLATE
    first, second, third = ({"type": "image", "image": each} for each in pictures(3))
    word = {"type": "text", "text": "a"}
    turns = [("user", [first, word]), ("assistant", [word]), ("user", [word, second])]
    answered = [{"role": role, "content": content} for role, content in turns]
    rows = [answered, [{"role": "user", "content": [word]}], [{"role": "user", "content": [third]}]]
    made = processor.apply_chat_template(rows, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    assert [words(processor, row).strip() for row in made["input_ids"]] == [
        f"user: {SLOTS}<image>a assistant: a user: a{SLOTS}<image>", "user: a", f"user: {SLOTS}<image>",
    ]  # fmt: skip
    text = processor.apply_chat_template(answered)
    assert "<|spatial|>" not in text  # the processor's call inserts them
    again = processor(images=pictures(2), text=text, return_tensors="pt")["input_ids"]
    assert torch.equal(again[0], made["input_ids"][0])
    assert (again == attachment_of(model).token_id).sum() == 12


def test_images_first_and_numpy(attached):
    _, processor, _ = attached
    expected = processor(images=pictures(1), text="a <image> b", return_tensors="pt")["input_ids"]
    assert torch.equal(processor(pictures(1), "a <image> b", return_tensors="pt")["input_ids"], expected)
    found = processor(images=pictures(1), text="a <image> b", return_tensors="np")["input_ids"]
    assert found.tolist() == expected.tolist()


def test_types_of_slots(attached):
    model, processor, _ = attached
    made = processor(images=pictures(1), text="a <image> b", return_tensors="pt", return_mm_token_type_ids=True)
    assert torch.equal(made["mm_token_type_ids"], (made["input_ids"] == model.config.image_token_id).long())


def test_qwen():
    """Slots stand before the token that opens the image; they are text to the model's positions; videos are left alone."""
    base, plain = qwen()
    model, processor = attach(base, plain, resize="pool", **FIELDS)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    made = processor(images=pictures(1, (48, 32)), text=[f"What {place} is"], return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    slot, config = attachment_of(model).token_id, model.config
    first = ids.index(slot)
    assert ids[first : first + 8] == [slot] * 6 + [config.vision_start_token_id, config.image_token_id]
    if "mm_token_type_ids" in made:
        assert made["mm_token_type_ids"][0].tolist() == [int(each == config.image_token_id) for each in ids]
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    clip = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with_video = processor(videos=[clip], text=[f"What {video} is"], return_tensors="pt")
    assert torch.equal(with_video["input_ids"], plain(videos=[clip], text=[f"What {video} is"], return_tensors="pt")["input_ids"])


def test_a_video_beside_an_image():
    base, plain = qwen()
    model, processor = attach(base, plain, resize="pool", **FIELDS)
    text = "What <|vision_start|><|video_pad|><|vision_end|> is <|vision_start|><|image_pad|><|vision_end|>"
    clip = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    made = processor(images=pictures(1, (48, 32)), videos=[clip], text=[text], return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    slot = attachment_of(model).token_id
    assert groups_before(ids, slot, model.config.image_token_id) == [6]
    assert ids.index(model.config.video_token_id) < ids.index(slot)
    with torch.no_grad():
        logits = model(**made).logits
        detach(model)
        without = base(**plain(images=pictures(1, (48, 32)), videos=[clip], text=[text], return_tensors="pt")).logits
    first, others = ids.index(slot), [each for each in range(without.shape[-1]) if each != slot]
    torch.testing.assert_close(logits[0, :first, others], without[0, :first, others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tensors", [None, "np"])
def test_image_mode_without_tensors(tensors):
    base, plain = llava()
    model, processor = attach(base, plain, mode="image", **FIELDS)
    made = processor(images=pictures(1), text="a <image> b", return_tensors=tensors)
    assert sum(int(each) == model.config.image_token_id for each in made["input_ids"][0]) == 582


def test_image_mode():
    base, plain = llava()
    model, processor = attach(base, plain, mode="image", **FIELDS)
    made = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert (made["input_ids"] == model.config.image_token_id).sum() == 582
    assert attachment_of(model).token_id == model.config.image_token_id
    assert model.generate(**made, max_new_tokens=2).shape[1] == made["input_ids"].shape[1] + 2


def test_the_original_is_untouched():
    base, plain = llava()
    before = len(plain.tokenizer)
    _, processor = attach(base, plain, **FIELDS)
    assert len(plain.tokenizer) == before
    assert type(plain).__name__ == type(processor).__name__ == "LlavaProcessor"
    assert isinstance(processor, transformers.LlavaProcessor)
    assert words(plain, plain(images=pictures(1), text="<image>")["input_ids"][0]) == "<image>"
    detach(base, processor)
    assert type(processor) is transformers.LlavaProcessor
    assert words(processor, processor(images=pictures(1), text="<image>")["input_ids"][0]) == "<image>"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_insert_placeholders_too(attached, copied):
    _, processor, _ = attached
    made = copied(processor)(images=pictures(1), text="a <image> b")
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"


def test_saved_and_loaded(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    expected = model(**inputs).logits
    save_adapter(model, tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "processor")
    detach(model)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "processor")
    assert type(loaded) is transformers.LlavaProcessor
    model, again = load_adapter(base, tmp_path / "adapter", loaded)
    made = again(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert torch.equal(made["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("processor", ["a string", 3])
def test_what_is_no_processor(processor):
    base, _ = llava()
    with pytest.raises(SpatialTokensError, match="a processor with a tokenizer is expected"):
        attach(base, processor, **FIELDS)
    assert not hasattr(base, "spatial_tokens")


# Processors of other families, each with the text of an image

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GRID_OF_4 = {"projector": "llava-sp-cropping", "kernel_sizes": [2, 4], "detail_kernel_size": 2, **FIELDS}


def letters(named, others=()):
    """A tokenizer of letters, with these special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    found = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=named
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(others)}, replace_extra_special_tokens=False)
    return tokenizer


def idefics3():
    named = {"image_token": "<image>", "fake": "<fake_token_around_image>", "glob": "<global-img>", "end": "<end_of_utterance>"}
    tokenizer = letters(named, [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)])
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **SMALL},
        vision_config={"image_size": 32, "patch_size": 8, **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    return transformers.Idefics3ForConditionalGeneration(config).eval(), processor, "<image>"


def gemma3():
    tokenizer = letters({"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"})
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    config = transformers.Gemma3Config(
        text_config={
            "model_type": "gemma3_text", "vocab_size": len(tokenizer), "head_dim": 8, "num_key_value_heads": 2, **SMALL,
            "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False, **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"), mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config).eval(), processor, "<start_of_image>"


def internvl():
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = letters(named)
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    config = transformers.InternVLConfig(
        vision_config={"image_size": [64, 64], "patch_size": [8, 8], **VISION},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **SMALL},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), downsample_ratio=0.5,
    )  # fmt: skip
    processor = transformers.InternVLProcessor(images, tokenizer, transformers.InternVLVideoProcessor(), image_seq_length=16)
    return transformers.InternVLForConditionalGeneration(config).eval(), processor, "<IMG_CONTEXT>"


def llava_next():
    tokenizer = letters({"image_token": "<image>"})
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **VISION},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **SMALL},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval(), processor, "<image>"


FAMILIES = [idefics3, gemma3, internvl, llava_next]


def groups_before(ids, slot, image):
    """How many slots each run of them has, and whether the last of them stands at most three tokens before an image token."""
    found, i = [], 0
    while i < len(ids):
        if ids[i] == slot:
            end = next(j for j in range(i, len(ids) + 1) if j == len(ids) or ids[j] != slot)
            assert image in ids[end : end + 4]
            found.append(end - i)
            i = end
        i += 1
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, side):
    """Rows of two, no and one image: slots before each, all else as without them; the batch is its rows."""
    base, plain, place = family()
    texts, images = [f"{place} a {place} b", "words", f"c {place}"], pictures(3, (128, 80))
    nested = images if family is internvl else [images[:2], [], images[2:]]  # it takes a flat list only
    options = {"return_tensors": "pt", "padding": True, "padding_side": side}
    before = plain(images=nested, text=texts, **options)
    model, processor = attach(base, plain, **GRID_OF_4)
    made = processor(images=nested, text=texts, **options)
    slot, image = attachment_of(model).token_id, attachment_of(model).parts.image_token_id
    assert [groups_before(row, slot, image) for row in made["input_ids"].tolist()] == [[2, 2], [], [2]]
    kept = made["attention_mask"].bool() & (made["input_ids"] != slot)
    assert torch.equal(made["input_ids"][kept], before["input_ids"][before["attention_mask"].bool()])
    assert torch.equal(made["pixel_values"], before["pixel_values"])
    assert not any(made[name][made["input_ids"] == slot].any() for name in ("token_type_ids", "mm_token_type_ids") if name in made)
    logits = model(**made).logits
    for row, (text, alone) in enumerate(zip(texts, (images[:2], None, images[2:]), strict=True)):
        expected = model(**processor(images=alone, text=[text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits[row][made["attention_mask"][row].bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "tiles"), [(idefics3, 5), (internvl, 3), (llava_next, 5)])
def test_slots_for_every_tile(family, tiles):
    """A picture of 128 x 80 is cut into 2 x 2 tiles, or into two; the thumbnail has slots too."""
    base, plain, place = family()
    model, processor = attach(base, plain, unit="tile", **GRID_OF_4)
    texts, images = [f"a {place}", "words"], pictures(1, (128, 80))
    made = processor(images=images if family is internvl else [images, []], text=texts, return_tensors="pt", padding=True)
    assert (made["input_ids"] == attachment_of(model).token_id).sum(1).tolist() == [2 * tiles, 0]
    assert model(**made).logits.isfinite().all()
    kept = made["attention_mask"][0].bool()
    assert processor(images=images, text=texts[:1])["input_ids"] == [made["input_ids"][0][kept].tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_in_conversation(family):
    base, plain, place = family()
    model, processor = attach(base, plain, **GRID_OF_4)
    processor.chat_template = TEMPLATE.replace("<image>", place)
    images = [{"type": "image", "image": each} for each in pictures(3, (128, 80))]
    word = {"type": "text", "text": "a"}
    contents = [[images[0], word, images[1]], [word, images[2]], [word]]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    made = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    assert (made["input_ids"] == attachment_of(model).token_id).sum(1).tolist() == [4, 2, 0]
    turns = [*conversations[0], {"role": "assistant", "content": [word]}, *conversations[1]]
    made = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    assert (made["input_ids"] == attachment_of(model).token_id).sum() == 6


@pytest.mark.parametrize("family", [*FAMILIES, lambda: (*qwen(), "<|vision_start|><|image_pad|><|vision_end|>")])
def test_other_families_on_disk(tmp_path, family):
    base, plain, place = family()
    fields = {"resize": "pool", **FIELDS} if base.config.model_type.startswith("qwen") else GRID_OF_4
    model, processor = attach(base, plain, **fields)
    given = {"images": pictures(1, (128, 80)), "text": [f"a {place}"], "return_tensors": "pt"}
    expected = processor(**given)
    save_adapter(model, tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "processor")
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "processor")
    assert type(loaded) is type(plain)
    detach(model)
    model, again = load_adapter(base, tmp_path / "adapter", loaded)
    found = again(**given)
    assert found.keys() == expected.keys()
    pixels = {"pixel_values"}  # of another backend, which transformers may choose for what it loads
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() - pixels)
    assert found["pixel_values"].shape == expected["pixel_values"].shape


@pytest.mark.xfail(strict=True, reason="the crops of one image have no slots")
def test_pan_and_scan():
    base, plain, place = gemma3()
    model, processor = attach(base, plain, **GRID_OF_4)
    options = {
        "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.1,
    }  # fmt: skip
    made = processor(images=[pictures(1, (256, 80))], text=[place], images_kwargs=options, return_tensors="pt")
    assert (made["input_ids"] == attachment_of(model).token_id).sum() == 2 * len(made["pixel_values"])
    assert model(**made).logits.isfinite().all()


def test_a_processor_that_inserts_placeholders_already(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    save_adapter(model, tmp_path)
    expected = processor(images=pictures(1), text="a <image> b")["input_ids"]
    for again in (lambda: attach(base, processor, **FIELDS), lambda: load_adapter(base, tmp_path, processor)):
        detach(model)
        _, second = again()
        assert second(images=pictures(1), text="a <image> b")["input_ids"] == expected
        assert processor(images=pictures(1), text="a <image> b")["input_ids"] == expected


# What a processor says about its text is what the plain one says, moved by the placeholders

TURNS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}"
)


def conversation(text="What?"):
    first, second = ({"type": "image", "image": each} for each in pictures(2, (128, 80)))
    turns = [("user", [first, text]), ("assistant", ["a b"]), ("user", [text, second, text]), ("assistant", ["c"])]
    return [
        {"role": role, "content": [each if isinstance(each, dict) else {"type": "text", "text": each} for each in content]}
        for role, content in turns
    ]


def both(family, mode="own", count=2):
    """The plain processor and the one that inserts placeholders, their placeholder's id, and the text of an image."""
    base, plain, place = family()
    fields = {"resize": "pool", **FIELDS} if base.config.model_type.startswith("qwen") else GRID_OF_4 if count == 2 else FIELDS
    model, processor = attach(base, plain, mode=mode, **fields)
    plain.chat_template = processor.chat_template = TURNS.replace("IMAGE", place)
    return plain, processor, attachment_of(model).token_id, place


def moved(row, ids, plain_ids, reserved, value):
    """A row of the plain processor, with a value wherever `ids` has a placeholder that `plain_ids` has not."""
    made, rest = [], list(zip(plain_ids, row, strict=True))
    for each in ids:
        if rest and each == rest[0][0] and not (each == reserved and ids.count(reserved) > plain_ids.count(reserved)):
            made.append(rest.pop(0)[1])
        else:
            made.append(value)
    assert not rest
    return made


# Before, transformers did not count how much longer images make the text.
THEIR_MASKS_ARE_RIGHT = hasattr(transformers.ProcessorMixin, "_adjust_assistant_masks_indices")
LLAVA = lambda: (*llava(), "<image>")  # noqa: E731
QWEN = lambda: (*qwen(), "<|vision_start|><|image_pad|><|vision_end|>")  # noqa: E731


@pytest.mark.parametrize(("family", "count"), [(LLAVA, 6), (QWEN, 6), (idefics3, 2), (gemma3, 2)])
def test_the_answers_of_a_conversation(family, count):
    """`return_assistant_tokens_mask` marks the answers, and not what stands that far behind the placeholders."""
    plain, processor, reserved, _ = both(family, count=count)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    before, made = (each.apply_chat_template(conversation(), **options) for each in (plain, processor))
    ids, plain_ids = made["input_ids"][0], before["input_ids"][0]
    assert ids.count(reserved) == 2 * count
    assert made["assistant_masks"][0] == moved(before["assistant_masks"][0], ids, plain_ids, reserved, 0)
    if family is not QWEN and THEIR_MASKS_ARE_RIGHT:  # Qwen's tokenizer here knows few words
        kept = [each for each, mask in zip(ids, made["assistant_masks"][0], strict=True) if mask]
        assert processor.tokenizer.decode(kept).replace(" ", "") == "abc"


def test_the_answers_of_a_conversation_in_image_mode():
    base, plain = llava()
    _, processor = attach(base, plain, mode="image", **FIELDS)
    plain.chat_template = processor.chat_template = TURNS.replace("IMAGE", "<image>")
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    before, made = (each.apply_chat_template(conversation(), **options) for each in (plain, processor))
    for each in (before, made) if THEIR_MASKS_ARE_RIGHT else ():
        kept = [i for i, m in zip(each["input_ids"][0], each["assistant_masks"][0], strict=True) if m]
        assert plain.tokenizer.decode(kept).replace(" ", "") == "abc"
    assert sum(made["assistant_masks"][0]) == sum(before["assistant_masks"][0])
    assert len(made["input_ids"][0]) == len(before["input_ids"][0]) + 12


@pytest.mark.parametrize("mode", ["own", "image"])
def test_sanitized_words_of_the_user(mode):
    """A user who writes `<image>` or the reserved token has written words; transformers 5.24 can tell them from the template's."""
    if "sanitize_control_tokens" not in inspect.signature(transformers.ProcessorMixin.apply_chat_template).parameters:
        pytest.skip("this version of transformers has no sanitize_control_tokens")
    plain, processor, reserved, _ = both(LLAVA, mode, count=6)
    options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    asked = conversation("What is <image>, and what is <|spatial|>?")
    before, made = (each.apply_chat_template(asked, **options)["input_ids"][0] for each in (plain, processor))
    assert len(made) == len(before) + 12
    if mode == "own":
        assert [each for each in made if each != reserved] == before
        assert groups_before(made, reserved, plain.tokenizer.convert_tokens_to_ids("<image>")) == [6, 6]


def test_sanitized_words_that_are_padded_and_cut_off_on_the_left():
    """Such an encoding does not say where its tokens were."""
    from tokenizers.processors import TemplateProcessing

    if "sanitize_control_tokens" not in inspect.signature(transformers.ProcessorMixin.apply_chat_template).parameters:
        pytest.skip("this version of transformers has no sanitize_control_tokens")
    plain, processor, reserved, _ = both(LLAVA, count=6)
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", plain.tokenizer.bos_token_id)])
    for each in (plain, processor):
        each.chat_template = f"<s>{each.chat_template}"  # which the tokenizer then does not add
        each.tokenizer.backend_tokenizer.post_processor = start
        each.tokenizer.padding_side = each.tokenizer.truncation_side = "left"
    asked = [conversation("What is <image>?"), conversation("What is this?")[2:]]
    options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    longest = len(plain.apply_chat_template(asked[0], **options)["input_ids"][0])
    for kwargs in ({"padding": True}, {"padding": True, "truncation": True, "max_length": longest - 3}):
        before, made = (each.apply_chat_template(asked, **options, processor_kwargs=kwargs) for each in (plain, processor))
        for row, images in enumerate((2, 1)):
            ids, mask = made["input_ids"][row], made["attention_mask"][row]
            kept = [each for each, m in zip(ids, mask, strict=True) if m]
            expected = [each for each, m in zip(before["input_ids"][row], before["attention_mask"][row], strict=True) if m]
            assert [each for each in kept if each != reserved] == expected
            starts = [i for i, each in enumerate(kept) if each == processor.image_token_id and kept[i - 1] != each]
            assert [kept[i - 6 : i] for i in starts[-images:]] == [[reserved] * 6] * images


def test_a_processor_that_tokenizes_more_than_the_text():
    base, plain = llava()

    class Again(type(plain)):
        def __call__(self, images=None, text=None, **kwargs):
            made = super().__call__(images=images, text=text, **kwargs)
            self.tokenizer("x")
            return made

    plain.__class__ = Again
    _, processor = attach(base, plain, **FIELDS)
    assert words(processor, processor(images=pictures(1), text="a <image>")["input_ids"][0]) == f"a {SLOTS}<image>"


@pytest.mark.skipif(not hasattr(transformers.ProcessorMixin, "get_text_with_replacements"), reason="an older transformers")
@pytest.mark.parametrize("family", [LLAVA, QWEN])
def test_where_images_are_said_to_be_in_the_text(family):
    """In the caller's text, and in the expanded one: also of images that touch."""
    plain, processor, _, place = both(family, count=6)
    given = {"text": [f"a {place}{place} b", place], "images": pictures(3, (128, 80)), "return_text_replacement_offsets": True}
    before, made = (each(**given)["text_replacement_offsets"] for each in (plain, processor))
    assert made == before
    assert [len(row) for row in made] == [2, 1]


@pytest.mark.parametrize(("family", "count"), [(LLAVA, 6), (QWEN, 6), (idefics3, 2), (gemma3, 2)])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_offsets_and_masks(family, count, tensors):
    """Each token's characters are those that it has without placeholders; a placeholder has none, where its image starts."""
    plain, processor, reserved, place = both(family, count=count)
    texts = [f"ab {place} c {place}", f"{place} d"]
    images = [pictures(2, (128, 80)), pictures(1, (128, 80))]
    options = {
        "return_tensors": tensors,
        "padding": bool(tensors),
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
    }
    before, made = (each(text=texts, images=images, **options) for each in (plain, processor))
    for row in range(2):
        ids, plain_ids = (list(map(int, each["input_ids"][row])) for each in (made, before))
        if tensors:
            kept = [i for i, each in enumerate(made["attention_mask"][row]) if each]
            ids, first = ids[kept[0] : kept[-1] + 1], kept[0]
            plain_kept = [i for i, each in enumerate(before["attention_mask"][row]) if each]
            plain_ids, plain_first = plain_ids[plain_kept[0] : plain_kept[-1] + 1], plain_kept[0]
        else:
            first = plain_first = 0
        assert [each for each in ids if each != reserved] == plain_ids
        for name, value in (("offset_mapping", None), ("special_tokens_mask", 1), ("attention_mask", 1)):
            value_of = (lambda each: tuple(map(int, each))) if name == "offset_mapping" else int
            found, expected = (
                [value_of(each) for each in given[name][row][start : start + len(length)]]
                for given, start, length in ((made, first, ids), (before, plain_first, plain_ids))
            )
            expected = moved(expected, ids, plain_ids, reserved, value)
            for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                if theirs is not None:
                    assert mine == theirs
                else:  # the start of the next token that is none
                    following = next(each for each in expected[i:] if each is not None)
                    assert mine == (following[0], following[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [False, True])
def test_truncation(side, padding):
    """As many of the caller's tokens are kept as without placeholders; rows of one image and of none."""
    plain, processor, reserved, _ = both(LLAVA, count=6)
    for each in (plain, processor):
        each.tokenizer.truncation_side = side
    texts = ["abc <image> def" if side == "right" else "abcdef <image> d", "x" * 650]
    options = {"truncation": True, "max_length": 582, "padding": padding}
    before, made = (each(text=texts, images=pictures(1), **options) for each in (plain, processor))
    for row in range(2):
        ids = [i for i, m in zip(made["input_ids"][row], made["attention_mask"][row], strict=True) if m]
        expected = [i for i, m in zip(before["input_ids"][row], before["attention_mask"][row], strict=True) if m]
        assert len(expected) == 582
        assert [each for each in ids if each != reserved] == expected
        assert ids.count(reserved) == (6, 0)[row]


def test_padded_to_a_multiple_and_to_a_length():
    _, processor, _, _ = both(LLAVA, count=6)
    given = {"text": ["a <image> b", "c"], "images": pictures(1), "return_tensors": "pt"}
    assert processor(**given, padding=True, pad_to_multiple_of=64)["input_ids"].shape == (2, 640)
    assert processor(**given, padding=True, pad_to_multiple_of=8)["input_ids"].shape == (2, 592)
    assert processor(**given, text_kwargs={"padding": True, "pad_to_multiple_of": 64})["input_ids"].shape == (2, 640)
    assert processor(**given, padding="max_length", max_length=600)["input_ids"].shape == (2, 606)


def test_lengths_count_placeholders():
    _, processor, _, _ = both(LLAVA, count=6)
    made = processor(text=["a <image> b", "c"], images=pictures(1), return_length=True)
    assert made["length"] == [len(row) for row in made["input_ids"]]


def test_many_threads_with_one_processor():
    _, processor, reserved, _ = both(LLAVA, count=6)
    texts = ["<image> " + "a" * i for i in range(8)]
    (image,) = pictures(1)
    expected = [processor(text=text, images=image)["input_ids"] for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: processor(text=text, images=image)["input_ids"], texts * 4))
    assert found == expected * 4
    assert all(each[0].count(reserved) == 6 for each in found)


# The reserved token


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("</s>", "'</s>' has a use of its own"), ("<image>", "'<image>' has a use of its own"), ("a", "'a' has a use of its own"),
        ("", "token must be the text of a token"), (" <x> ", "token must be the text of a token"), (3, "token must be the text"),
        (None, "token must be the text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_processor", [True, False])
def test_a_token_with_another_use(token, message, with_processor):
    base, plain = llava()
    if not with_processor and isinstance(token, str) and token.strip() == token and token:
        pytest.skip("without a tokenizer nothing tells")
    with pytest.raises(SpatialTokensError, match=message):
        attach(base, plain if with_processor else None, token=token, **FIELDS)
    assert not hasattr(base, "spatial_tokens")


def test_a_token_of_a_chat_template_and_one_that_is_free():
    base, plain = llava()
    plain.tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|free|>"]}, replace_extra_special_tokens=False)
    plain.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(SpatialTokensError, match=r"'<\|turn\|>' has a use of its own"):
        attach(base, plain, token="<|turn|>", **FIELDS)
    model, processor = attach(base, plain, token="<|free|>", **FIELDS)
    assert attachment_of(model).token_id == plain.tokenizer.convert_tokens_to_ids("<|free|>")
    assert words(processor, processor(images=pictures(1), text="<image>")["input_ids"][0]) == "<|free|>" * 6 + "<image>"


@pytest.mark.parametrize("token_id", [-1, 1.0, True, "5", 2, 10**12, 99])
def test_ids_that_are_no_free_tokens(token_id):
    """2 ends a sequence, 99 is the image's."""
    base, _ = llava()
    with pytest.raises(SpatialTokensError, match="token_id must"):
        attach(base, token_id=token_id, **FIELDS)


def test_the_stand_in_of_a_model_without_a_token_for_the_start():
    """The last token that the model gives no meaning; 99 is the image's."""
    base, plain = llava()
    for config in (base.config, base.config.text_config, base.generation_config):
        config.bos_token_id = None
    model, processor = attach(base, plain, **FIELDS)
    assert attachment_of(model).token.stand_in == 98
    model(**processor(images=pictures(1), text="<image> is", return_tensors="pt"))


def test_ids_that_generation_alone_names():
    base, plain = llava()
    base.generation_config.eos_token_id = [2, 98]
    with pytest.raises(SpatialTokensError, match="98 is the model's eos_token_id"):
        attach(base, token_id=98, **FIELDS)
    with pytest.raises(SpatialTokensError, match=r"the tokenizer gives .* the id 100, not 97; leave token_id out"):
        attach(base, plain, token_id=97, **FIELDS)


# What public reports and a reviewer found


def test_characters_of_private_use():
    """The mark is one that no text has."""
    _, processor, reserved, _ = both(LLAVA, count=6)
    text = "\U0010fffd <image> \U0010fffc\ue000"
    made = processor(text=text, images=pictures(1))["input_ids"][0]
    assert made.count(reserved) == 6
    assert made.index(reserved) == made.index(99) - 6 == 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_rows_as_long_as_each_other_of_which_one_has_an_image(side, tensors):
    """Nothing in the plain row tells on which side it would be padded."""
    plain, processor, _, place = both(gemma3)
    length = len(plain(text=[f"{place} a"], images=[pictures(1)])["input_ids"][0])
    given = {"text": [f"{place} a", "x" * length], "images": [pictures(1), []]}
    assert len({len(each) for each in plain(**given)["input_ids"]}) == 1
    options = {"padding": True, "padding_side": side, "return_tensors": tensors}
    made = processor(**given, **options)
    lengths = [len(each) for each in made["input_ids"]]
    assert lengths == [length + 2] * 2
    assert list(map(int, made["attention_mask"][1])) == ([0, 0] + [1] * length if side == "left" else [1] * length + [0, 0])
    without_mask = processor(**given, **options, return_attention_mask=False)
    assert [list(map(int, row)) for row in without_mask["input_ids"]] == [list(map(int, row)) for row in made["input_ids"]]


def test_an_image_token_that_takes_the_space_before_it():
    from tokenizers import AddedToken

    base, plain = llava()
    plain.tokenizer.add_tokens([AddedToken("<image>", special=True, lstrip=True, normalized=False)], special_tokens=True)
    model, processor = attach(base, plain, **FIELDS)
    ids = processor(text="a <image> b", images=pictures(1))["input_ids"][0]
    assert groups_before(ids, attachment_of(model).token_id, base.config.image_token_id) == [6]
    assert ids[ids.index(base.config.image_token_id) - 1] == attachment_of(model).token_id


def paligemma():
    tokenizer = letters({"image_token": "<image>"})
    tokenizer.add_tokens([f"<loc{i:04}>" for i in range(2)])
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    config = transformers.PaliGemmaConfig(
        text_config={
            "model_type": "gemma", "vocab_size": len(tokenizer) + 1200, "head_dim": 8, "num_key_value_heads": 2, **SMALL
        },
        vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False, **VISION},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=32,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config).eval(), transformers.PaliGemmaProcessor(images, tokenizer)


@pytest.mark.parametrize("mode", ["own", "image"])
def test_a_processor_that_puts_images_before_the_text(mode):
    base, plain = paligemma()
    model, processor = attach(base, plain, mode=mode, **GRID_OF_4)
    for options in ({}, {"suffix": "cd"}):
        before, made = (each(text="ab", images=pictures(1), return_tensors="pt", **options) for each in (plain, processor))
        reserved = attachment_of(model).token_id
        assert made["input_ids"][0, :2].tolist() == [reserved] * 2
        assert torch.equal(made["input_ids"][:, 2:], before["input_ids"])
        if options:
            assert made["labels"][0].tolist() == [-100] * 2 + before["labels"][0].tolist()
    assert model(**made).logits.isfinite().all()
    with pytest.raises(SpatialTokensError, match="2 images were given, 1 found in the text; write '<image>' where each goes"):
        processor(text="ab", images=[pictures(2)], return_tensors="pt")


def test_images_in_arrays():
    _, processor, reserved, _ = both(LLAVA, count=6)
    pixels = torch.zeros(2, 3, 336, 336)
    for images in (pixels, [pixels]):
        assert processor(text="<image> a <image>", images=images)["input_ids"][0].count(reserved) == 12


def test_images_that_touch_and_have_tiles():
    base, plain, _ = llava_next()
    model, processor = attach(base, plain, unit="tile", **GRID_OF_4)
    made = processor(text="<image><image> a", images=pictures(2, (128, 80)), return_tensors="pt")
    assert (made["input_ids"] == attachment_of(model).token_id).sum() == 2 * 2 * 5
    assert model(**made).logits.isfinite().all()


def test_images_of_different_numbers_of_tiles():
    base, plain, _ = llava_next()
    model, processor = attach(base, plain, unit="tile", **GRID_OF_4)
    given = {"text": "<image> a <image>", "images": pictures(1, (64, 32)) + pictures(1, (64, 64)), "return_tensors": "pt"}
    made, expected = processor(**given)["input_ids"], insert_placeholders(model, plain(**given))["input_ids"]
    assert torch.equal(made, expected)
    assert groups_before(made[0].tolist(), attachment_of(model).token_id, processor.image_token_id) == [2 * 3, 2 * 5]


def test_an_image_whose_text_the_processor_joins_with_the_word_before():
    """Gemma's begins with two line feeds, which a tokenizer may have in one token with a word; places are after it."""
    base, plain, place = gemma3()
    plain.tokenizer.add_tokens(["c\n\n"])
    model, processor = attach(base, plain, **GRID_OF_4)
    ids = processor(text=[f"ab c{place}"], images=pictures(1))["input_ids"][0]
    at = ids.index(attachment_of(model).token_id)
    assert processor.tokenizer.convert_ids_to_tokens(ids)[at - 1 : at + 3] == ["c\n\n", *[TOKEN] * 2, place]


@pytest.mark.parametrize("token", ["image", "<ima", "<image><x>", "\ud800"])
def test_a_token_that_is_part_of_another(token):
    base, plain = llava()
    with pytest.raises(SpatialTokensError, match=r"is a part of a token that has|token must be the text of a token"):
        attach(base, plain, token=token, **FIELDS)
