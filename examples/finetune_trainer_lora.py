"""Trains spatial tokens, and a LoRA of the language model, with transformers' Trainer.

python examples/finetune_trainer_lora.py llava-hf/llava-1.5-7b-hf data.jsonl output
(each line of data.jsonl: {"image": "path.jpg", "question": "...", "answer": "..."})
"""

import json
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from spatial_tokens.adapters.huggingface import attach, save_adapter
from spatial_tokens.pictures import read_picture


class Collator:
    """Rows to a batch; the loss is on the answers alone."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        """`input_ids`, `attention_mask`, `pixel_values` and `labels`."""
        prompts = [f"USER: <image> {row['question']} ASSISTANT:" for row in rows]
        images = [row["image"] for row in rows]
        whole = [f"{prompt} {row['answer']}" for prompt, row in zip(prompts, rows, strict=True)]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
        batch = self.processor(images=images, text=whole, **options)
        lengths = self.processor(images=images, text=prompts, **options)["attention_mask"].sum(1)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, length in zip(labels, lengths, strict=True):
            row[:length] = -100
        return {**batch, "labels": labels}


def main(model, processor, rows, output, *, steps=100, batch=4, **fields):
    """Trains, writes the spatial tokens to output/spatial and the LoRA to output/lora, and gives the losses."""
    model, processor = attach(model, processor, "llava-sp-cropping", **fields)
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    # PEFT has frozen all but its own weights, which it keeps in float32: an optimizer's steps are too small for bfloat16.
    model.base_model.model.spatial_tokens.float().requires_grad_(True)

    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, logging_steps=1,
        remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=Collator(processor))
    trainer.train()
    save_adapter(model, Path(output) / "spatial")
    model.save_pretrained(Path(output) / "lora")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, data, folder = sys.argv[1:]
    table = [json.loads(line) for line in Path(data).read_text().splitlines()]
    table = [{**row, "image": read_picture(row["image"])} for row in table]
    main(AutoModelForImageTextToText.from_pretrained(name, dtype="auto"), AutoProcessor.from_pretrained(name), table, folder)
