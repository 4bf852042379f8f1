"""Fine-tunes spatial tokens, and a LoRA of the language model, in a Qwen-VL, with its chat template.

python examples/finetune_qwen_vl.py
python examples/finetune_qwen_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data.jsonl --output qwen-sp

The first line runs on a tiny model of random weights. Each line of data.jsonl is {"image": "path.jpg", "question": "...",
"answer": "..."}. A Qwen-VL takes images of any size, so its spatial tokens have factorized kernels, which read every grid.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from spatial_tokens.adapters.huggingface import attach, print_trainable_parameters, save_adapter
from spatial_tokens.adapters.huggingface.ready import from_hub, tiny_qwen_vl
from spatial_tokens.pictures import read_picture
from spatial_tokens.visualize import sample_picture


def main(model, processor, rows, output, *, steps=100, batch=1, learning_rate=1e-3, **fields):
    """Trains; writes the spatial tokens to output/spatial and the LoRA to output/lora; gives the losses and the answers."""
    model, processor = attach(model, processor, "factorized-cropping", **fields)
    before = answer(model, processor, rows[0])
    lora = LoraConfig(r=8, target_modules=r".*language_model.*_proj", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    # PEFT has frozen all but its own weights, which it keeps in float32: an optimizer's steps are too small for bfloat16.
    model.base_model.model.spatial_tokens.float().requires_grad_(True)
    print_trainable_parameters(model)

    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=batch, learning_rate=learning_rate,
        logging_steps=max(1, steps // 5),
        logging_first_step=True,
        remove_unused_columns=False, report_to=[], save_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(processor))
    trainer.train()
    save_adapter(model, Path(output) / "spatial")
    model.save_pretrained(Path(output) / "lora")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, (before, answer(model, processor, rows[0]))


def prompt_of(processor, row):
    """The question in the model's own chat template, which says where the image stands."""
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class Collator:
    """Rows to a batch; the loss is on the answers alone."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        """The processor's tensors, and `labels`."""
        images, prompts = [row["image"] for row in rows], [prompt_of(self.processor, row) for row in rows]
        end = self.processor.tokenizer.eos_token
        whole = [f"{prompt}{row['answer']}{end}" for prompt, row in zip(prompts, rows, strict=True)]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
        batch = self.processor(images=images, text=whole, **options)
        lengths = self.processor(images=images, text=prompts, **options)["attention_mask"].sum(1)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, length in zip(labels, lengths, strict=True):
            row[:length] = -100
        return {**batch, "labels": labels}


@torch.no_grad()
def answer(model, processor, row):
    """What the model answers to a row's question."""
    model.eval()
    inputs = processor(images=row["image"], text=[prompt_of(processor, row)], return_tensors="pt").to(model.device)
    made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def command_line():
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Qwen-VL of the hub, or a folder (default: a tiny one of random weights)")
    parser.add_argument("--data", help="rows to train on (default: two drawn pictures)")
    parser.add_argument("--output", default="finetuned-qwen-vl", help="where the adapters go (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    given = parser.parse_args()
    set_seed(0)
    if given.data is None:
        pictures = {"a house": sample_picture((96, 128)), "a mirrored house": sample_picture((96, 64)).transpose(0)}
        rows = [{"image": picture, "question": "What is this?", "answer": text} for text, picture in pictures.items()]
    else:
        rows = [json.loads(line) for line in Path(given.data).read_text().splitlines()]
        rows = [{**row, "image": read_picture(row["image"])} for row in rows]
    model, processor = tiny_qwen_vl() if given.model is None else from_hub(given.model)
    tiny = {"batch": 2, "learning_rate": 1e-2, "spatial_hidden_size": 16} if given.model is None else {}
    losses, answers = main(model, processor, rows, given.output, steps=given.steps, **tiny)
    print(f"question: {rows[0]['question']}  expected: {rows[0]['answer']}")
    print(f"answer before training: {answers[0]!r}\nanswer after training:  {answers[1]!r}")
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f} in {given.steps} steps")
    print(f"wrote {given.output}/spatial (for load_adapter) and {given.output}/lora (for PeftModel.from_pretrained)")
    print("next: docs/tutorials/qwen-vl-lora.md loads both again; docs/families.md lists the other families that work")


if __name__ == "__main__":
    command_line()
