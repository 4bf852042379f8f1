"""Spatial tokens in a Qwen-VL, which takes images of any size: factorized kernels read the patches of every grid.

python examples/attach_qwen_vl.py Qwen/Qwen2.5-VL-3B-Instruct photo.jpg "What is on the table?"
"""

import sys

from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.pictures import read_picture


def main(model, processor, image, question, **fields):
    """The answer to a question about a picture."""
    model, processor = attach(model, processor, "factorized-cropping", **fields)
    text = f"<|vision_start|><|image_pad|><|vision_end|>{question}"  # or processor.apply_chat_template(...)
    inputs = processor(images=image, text=[text], return_tensors="pt").to(model.device)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(answer)


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, picture, question = sys.argv[1:]
    loaded = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    print(*main(loaded, AutoProcessor.from_pretrained(name), read_picture(picture), question))
