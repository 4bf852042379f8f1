"""Draws pictures of shapes, with captions and questions about them in LLaVA's format: something to train a tiny model on.

python examples/tiny_data.py tiny-data 64
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow")
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}


def main(folder, number=64, seed=0):
    """Writes images/, alignment.json, instructions.json and evaluation.json."""
    folder, chance = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, instructions = [], []
    for index in range(number):
        color, shape = chance.choice(COLORS), chance.choice(list(SHAPES))
        image = Image.new("RGB", (96, 96), "white")
        x, y, size = (chance.randrange(*span) for span in ((0, 48), (0, 48), (24, 48)))
        SHAPES[shape](ImageDraw.Draw(image), (x, y, x + size, y + size), fill=color)
        image.save(folder / "images" / f"{index}.png")
        where = f"{'left' if x + size / 2 < 48 else 'right'}, {'top' if y + size / 2 < 48 else 'bottom'}"
        captions.append(sample(index, f"{index}.png", ("<image>\nDescribe it.", f"a {color} {shape}")))
        if index % 4 == 3:  # text alone
            instructions.append(sample(index, None, ("Say the color.", color)))
        else:
            turns = (f"<image>\nWhere is the {shape}?", where), ("Which color?", color)
            instructions.append(sample(index, f"{index}.png", *turns))
    write(folder / "alignment.json", captions)
    write(folder / "instructions.json", instructions)
    write(folder / "evaluation.json", instructions[: max(1, number // 8)])


def sample(index, image, *rounds):
    """A sample of the format; without "image" where it is text alone."""
    turns = [{"from": who, "value": text} for each in rounds for who, text in zip(("human", "gpt"), each, strict=True)]
    return {"id": str(index), **({"image": image} if image else {}), "conversations": turns}


def write(path, samples):
    """Writes them as JSON."""
    path.write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="tiny-data", help="where they go (default: %(default)s)")
    parser.add_argument("number", nargs="?", type=int, default=64, help="how many pictures (default: %(default)s)")
    given = parser.parse_args()
    main(given.folder, given.number)
    print(f"wrote {given.folder}; next: python examples/train.py examples/configs/tiny/alignment.yaml")
