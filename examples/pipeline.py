"""Spatial tokens in transformers' pipeline("image-text-to-text"), which takes the model and processor that attach() returns.

python examples/pipeline.py
python examples/pipeline.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is on the table?"

The first line runs on a tiny model of random weights.
"""

import argparse

import torch
from transformers import pipeline

from spatial_tokens.adapters.huggingface import attach, print_trainable_parameters
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_llava
from spatial_tokens.pictures import read_picture
from spatial_tokens.visualize import sample_picture


def main(model, processor, image, question, **fields):
    """The pipeline's answers: without spatial tokens, and with them."""
    options = {"images": image, "text": f"<image> {question}", "max_new_tokens": 16, "return_full_text": False}
    without = pipeline("image-text-to-text", model=model, processor=processor)(**options)
    model, processor = attach(model, processor, "llava-sp-cropping", **fields)
    print_trainable_parameters(model)
    with_them = pipeline("image-text-to-text", model=model, processor=processor)(**options)
    return without[0]["generated_text"], with_them[0]["generated_text"]


def command_line():
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA of the hub, or a folder (default: a tiny one of random weights)")
    parser.add_argument("--image", help="a picture's path (default: a drawn one)")
    parser.add_argument("--question", default="What is this?", help="what to ask (default: %(default)s)")
    given = parser.parse_args()
    torch.manual_seed(0)
    model, processor = tiny_llava() if given.model is None else from_hub(given.model)
    picture = sample_picture() if given.image is None else read_picture(given.image)
    tiny = {"spatial_hidden_size": 16} if given.model is None else {}
    before, after = main(model, processor, picture, given.question, **tiny)
    print(f"question: {given.question}\nanswer without spatial tokens: {before}\nanswer with random ones: {after}")
    print("next: train them: examples/finetune_llava.py --help; or load trained ones: load_adapter(model, DIRECTORY, processor)")


if __name__ == "__main__":
    command_line()
