"""Spatial tokens in transformers' pipeline("image-text-to-text"), which takes the model and processor that attach() returns.

python examples/pipeline.py
python examples/pipeline.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is on the table?"

The first line runs on the small model of `spatial-tokens demo` and its trained spatial tokens; the second adds random ones.
"""

import argparse

import torch
from transformers import pipeline

from spatial_tokens.adapters.huggingface import attach, load_adapter, print_trainable_parameters
from spatial_tokens.adapters.huggingface.ready import TRAINED_ADAPTER, from_hub, trained_llava
from spatial_tokens.demo.scene_text import draw_scene
from spatial_tokens.pictures import read_picture


def main(model, processor, image, question, add=attach):
    """The pipeline's answers: without spatial tokens, and with those that `add` gives the model and its processor."""
    options = {"images": image, "text": f"<image> {question}", "max_new_tokens": 16, "return_full_text": False}
    without = pipeline("image-text-to-text", model=model, processor=processor)(**options)
    model, processor = add(model, processor)
    print_trainable_parameters(model)
    with_them = pipeline("image-text-to-text", model=model, processor=processor)(**options)
    return without[0]["generated_text"], with_them[0]["generated_text"]


def command_line():
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA of the hub, or a folder (default: the small trained one)")
    parser.add_argument("--image", help="a picture's path (default: a scene of two shapes)")
    parser.add_argument(
        "--question", default="Is the green circle left of the blue ring?", help="what to ask (default: %(default)s)"
    )
    given = parser.parse_args()
    torch.manual_seed(0)
    picture = draw_scene("green circle top left, large blue ring right") if given.image is None else read_picture(given.image)
    if given.model is None:
        before, after = main(
            *trained_llava(), picture, given.question, lambda *both: load_adapter(both[0], TRAINED_ADAPTER, both[1])
        )
    else:
        before, after = main(*from_hub(given.model), picture, given.question)
    kind = "trained" if given.model is None else "random"
    print(f"question: {given.question}\nanswer without spatial tokens: {before}\nanswer with {kind} ones: {after}")
    print("next: train your own: examples/finetune_llava.py --help; or load them: load_adapter(model, DIRECTORY, processor)")


if __name__ == "__main__":
    command_line()
