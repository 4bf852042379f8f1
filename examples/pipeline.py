"""Spatial tokens in transformers' pipeline("image-text-to-text"): it takes the model and processor that attach() returns.

python examples/pipeline.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?"
"""

import sys

from transformers import pipeline

from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.pictures import read_picture


def main(model, processor, image, question, **fields):
    """The pipeline's answer."""
    model, processor = attach(model, processor, "llava-sp-cropping", **fields)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    return ask(images=image, text=f"<image> {question}", max_new_tokens=16)[0]["generated_text"]


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, picture, question = sys.argv[1:]
    loaded = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    print(main(loaded, AutoProcessor.from_pretrained(name), read_picture(picture), question))
