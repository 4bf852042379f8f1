"""Two tiny models with their processors: a LLaVA and a Qwen2.5-VL."""

import torch

from spatial_tokens.adapters.huggingface.ready import tiny_llava, tiny_qwen_vl

FIELDS = {"spatial_hidden_size": 16}


def llava(seed=0):
    torch.manual_seed(seed)
    model, processor = tiny_llava()
    return model.eval(), processor


def qwen(seed=0):
    torch.manual_seed(seed)
    model, processor = tiny_qwen_vl()
    return model.eval(), processor


def pictures(count, size=(336, 336), seed=0):
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    return [
        Image.fromarray(torch.randint(256, (*size[::-1], 3), dtype=torch.uint8, generator=generator).numpy()) for _ in range(count)
    ]
