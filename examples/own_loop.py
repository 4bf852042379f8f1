"""Trains spatial tokens in a loop of your own; the rest of the model stays frozen, unless --whole-model is given.

python examples/own_loop.py
python examples/own_loop.py --model llava-hf/llava-1.5-7b-hf --data data.jsonl --output llava-sp

The first line trains a whole tiny model of random weights, as a frozen one of those cannot answer. Each line of data.jsonl is
{"image": "path.jpg", "question": "...", "answer": "..."}.
"""

import argparse
import json
from itertools import cycle, islice
from pathlib import Path

import torch

from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, print_trainable_parameters, save_adapter
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_llava
from spatial_tokens.pictures import read_picture
from spatial_tokens.visualize import sample_picture


def main(base, plain, rows, output, *, steps=100, learning_rate=1e-3, whole_model=False, **fields):
    """Trains, writes and loads the spatial tokens; gives the losses, and the answers before, after and once they were loaded."""
    model, processor = attach(base, plain, "llava-sp-cropping", **fields)
    answers = [answer(model, processor, rows[0])]
    model.requires_grad_(whole_model)
    model.spatial_tokens.float().requires_grad_(True)  # an optimizer's steps are too small for bfloat16
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print_trainable_parameters(model)

    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    model.train()
    losses = []
    for row in islice(cycle(rows), steps):
        loss = model(**batch_of(processor, row).to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.3f}")
    answers.append(answer(model, processor, rows[0]))

    save_adapter(model, output)  # adapter_config.json and adapter_model.safetensors, nothing of the base
    model, processor = load_adapter(detach(model), output, plain)
    return losses, [*answers, answer(model, processor, rows[0])]


def prompt_of(row):
    """LLaVA-1.5's own."""
    return f"USER: <image> {row['question']} ASSISTANT:"


def batch_of(processor, row):
    """A row as tensors, with labels: the loss is on the answer alone."""
    whole = f"{prompt_of(row)} {row['answer']}{processor.tokenizer.eos_token}"
    batch = processor(images=row["image"], text=whole, return_tensors="pt")
    length = processor(images=row["image"], text=prompt_of(row), return_tensors="pt")["input_ids"].shape[1]
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :length] = -100
    return batch


@torch.no_grad()
def answer(model, processor, row):
    """What the model answers to a row's question."""
    model.eval()
    inputs = processor(images=row["image"], text=prompt_of(row), return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def command_line():
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA of the hub, or a folder (default: a tiny one of random weights)")
    parser.add_argument("--data", help="rows to train on (default: two drawn pictures)")
    parser.add_argument("--output", default="trained-spatial-tokens", help="where the adapter goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--whole-model", action="store_true", help="train the model's own weights too")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.data is None:
        pictures = {"a house": sample_picture(), "a mirrored house": sample_picture().transpose(0)}
        rows = [{"image": picture, "question": "What is this?", "answer": text} for text, picture in pictures.items()]
    else:
        rows = [json.loads(line) for line in Path(given.data).read_text().splitlines()]
        rows = [{**row, "image": read_picture(row["image"])} for row in rows]
    model, processor = tiny_llava() if given.model is None else from_hub(given.model)
    tiny = {"learning_rate": 1e-2, "whole_model": True, "spatial_hidden_size": 16} if given.model is None else {}
    losses, answers = main(model, processor, rows, given.output, **{"steps": given.steps, "whole_model": given.whole_model, **tiny})
    print(f"question: {rows[0]['question']}  expected: {rows[0]['answer']}")
    for when, text in zip(("before training", "after training", "after loading"), answers, strict=True):
        print(f"answer {when}: {text!r}")
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    print(f"wrote {given.output}: load_adapter(model, {given.output!r}, processor) attaches it to the base model")
    print("next: train the language model too, with a LoRA: examples/finetune_llava.py --help")


if __name__ == "__main__":
    command_line()
