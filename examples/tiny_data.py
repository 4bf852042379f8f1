"""Draws pictures of shapes, with captions and questions about them in LLaVA's format: something to train a tiny model on.

python examples/tiny_data.py FOLDER [NUMBER]
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = {"circle": ImageDraw.ImageDraw.ellipse, "square": ImageDraw.ImageDraw.rectangle}


def main(folder, number=64, seed=0):
    """Writes images/, alignment.json, instructions.json and evaluation.json."""
    folder, chance = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, instructions = [], []
    for index in range(number):
        colour, shape = chance.choice(COLOURS), chance.choice(list(SHAPES))
        image = Image.new("RGB", (96, 96), "white")
        x, y, size = (chance.randrange(*span) for span in ((0, 48), (0, 48), (24, 48)))
        SHAPES[shape](ImageDraw.Draw(image), (x, y, x + size, y + size), fill=colour)
        image.save(folder / "images" / f"{index}.png")
        where = f"{'left' if x + size / 2 < 48 else 'right'}, {'top' if y + size / 2 < 48 else 'bottom'}"
        captions.append(sample(index, f"{index}.png", ("<image>\nDescribe it.", f"a {colour} {shape}")))
        if index % 4 == 3:  # text alone
            instructions.append(sample(index, None, ("Say the colour.", colour)))
        else:
            turns = (f"<image>\nWhere is the {shape}?", where), ("Which colour?", colour)
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
    main(sys.argv[1], *map(int, sys.argv[2:]))
