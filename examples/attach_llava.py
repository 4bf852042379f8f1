"""Spatial tokens in a LLaVA: attach, ask, save beside the base model, load again.

python examples/attach_llava.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?"
"""

import sys
import tempfile

from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.pictures import read_picture


def main(model, processor, image, question, **fields):
    """Gives the answers before and after the adapter was saved and loaded."""
    plain, base = processor, model
    model, processor = attach(base, plain, "llava-sp-cropping", **fields)
    inputs = processor(images=image, text=f"USER: <image> {question} ASSISTANT:", return_tensors="pt").to(model.device)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)  # adapter_config.json and adapter_model.safetensors, nothing of the base
        detach(model)
        model, processor = load_adapter(base, folder, plain)
    again = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(answer), processor.batch_decode(again)


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, picture, question = sys.argv[1:]
    loaded = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    print(*main(loaded, AutoProcessor.from_pretrained(name), read_picture(picture), question), sep="\n")
