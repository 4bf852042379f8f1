"""What each of two processes does under DeepSpeed's ZeRO-3, where each has half of every parameter."""

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface.saving import trained_tensors
from spatial_tokens.storage.sharded import gathered, is_sharded, tensors_of, whole
from spatial_tokens.training import ALIGNMENT, INSTRUCTION_TUNING, LoRA
from spatial_tokens.training.prepare import load_trained, prepare_model, require_finite, save_trained
from tests.training.on_cpu import import_deepspeed
from tests.training.workers import ROWS, mean, optimizer_of, zero_steps

ZERO3 = {
    "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True},
}  # fmt: skip


def zero3(case, rank, world):
    """Every parameter in parts. Each process has an image: the vision encoder is gathered by all or by none."""
    engine, *_ = import_deepspeed().initialize(model=case.model, optimizer=optimizer_of(case.model), config=ZERO3)
    found = zero_steps(case, engine, list(ROWS)[rank::world])
    assert all(each.numel() == 0 for each in case.model.parameters())
    return found


def in_parts(base):
    """The model as `from_pretrained` loads it under a config of ZeRO-3."""
    from transformers.integrations import HfDeepSpeedConfig

    import_deepspeed()
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        save_file(base.state_dict(), Path(folder, "model.safetensors"), {"format": "pt"})
        config = HfDeepSpeedConfig(ZERO3)
        loaded = type(base).from_pretrained(folder).eval()
        del config
    assert all(each.numel() == 0 for each in loaded.parameters())
    return loaded


def zero3_loaded(case, rank, world):
    """Attached to a base in parts, and trained; what Trainer saves of it as a model is the base alone."""
    from tests.adapters.huggingface.models import llava

    base, plain = llava()
    case.attach_to(in_parts(base), plain)
    engine, *_ = import_deepspeed().initialize(model=case.model, optimizer=optimizer_of(case.model), config=ZERO3)
    found = zero_steps(case, engine, list(ROWS)[rank::world])
    gathered = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            case.model.save_pretrained(folder, state_dict=gathered)
            loaded, info = type(base).from_pretrained(folder, output_loading_info=True)
        faults = ("missing_keys", "unexpected_keys", "mismatched_keys")
        found["base is whole"] = not any(info[fault] for fault in faults) and all(
            torch.equal(each, gathered[name]) for name, each in loaded.state_dict().items()
        )
    return found


def zero3_files(case, rank, world):
    """What one process trained, loaded onto bases in parts by each of the functions that load, trained on, and saved again."""
    from spatial_tokens.adapters.huggingface import detach, load_adapter
    from tests.adapters.huggingface.models import llava

    stage = replace(INSTRUCTION_TUNING, lora=LoRA(rank=2, alpha=4, dropout=0.0))

    def held(model):
        return gathered(trained_tensors(model)) if rank == 0 or any(map(is_sharded, model.parameters())) else {}

    def same(found, expected):
        return rank != 0 or (found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected))

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        base, plain = llava()
        mlp = {name: each.clone() for name, each in base.model.multi_modal_projector.state_dict().items()}
        case.attach_to(base, plain)
        model = prepare_model(case.model, stage)
        with torch.no_grad():
            for each in (each for each in model.parameters() if each.requires_grad):
                each.add_(torch.randn_like(each))
        save_trained(model, one)
        expected = {name: each.clone() for name, each in trained_tensors(model).items()}

        found = {}
        model, _ = load_adapter(in_parts(llava()[0]), f"{one}/spatial_tokens", plain)
        found["load_adapter"] = same(held(model), expected)
        parts = detach(model).model.multi_modal_projector
        found["detach"] = same(gathered(tensors_of(parts)), mlp)

        case.attach_to(in_parts(llava()[0]), plain)
        model = prepare_model(case.model, stage)
        load_trained(model, one)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=ZERO3)
        steps = []
        for _ in range(2):
            load_trained(model, one)
            found["load_trained"] = same(held(model), expected) and found.get("load_trained", True)
            engine.backward(case.loss(engine, list(ROWS)[rank::world]))
            engine.step()
            save_trained(model, shared[0])
            dist.barrier()
            steps.append(load_file(Path(shared[0], "lora", "adapter_model.safetensors")) | held(model))
            dist.barrier()
        found["a step, and the same again"] = same(*steps) and not same(held(model), expected) if rank == 0 else held(model) == {}
        with torch.no_grad(), whole(case.projector.spatial_head.fc.bias, write=True) as bias:
            bias[-1] = torch.nan
        try:
            require_finite(model)
        except SpatialTokensError as error:
            found["nan is seen"] = "spatial_head.fc.bias (nan)" in str(error)
        dist.barrier()
    return found


def in_bfloat16(case, rank, world):
    """Losses of prepared models whose weights DeepSpeed casts (its `bf16`): ZeRO-2; ZeRO-3, attached before and after."""
    from tests.adapters.huggingface.models import llava

    losses = []
    for stage, make in ((2, lambda base: base), (3, lambda base: base), (3, in_parts)):
        base, plain = llava()
        case.attach_to(make(base.to(torch.bfloat16)), plain)
        model = prepare_model(case.model, ALIGNMENT)
        settings = {**ZERO3, "bf16": {"enabled": True}, "zero_optimization": {**ZERO3["zero_optimization"], "stage": stage}}
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
        loss = case.loss(engine, list(ROWS)[rank::world])
        engine.backward(loss)
        engine.step()
        losses.append(mean(loss))
    return {"losses": losses}


FILES = "zero3 files, llava"
BFLOAT16 = "zero in bfloat16, llava"
LOADED = "zero3 loaded in parts, llava"
CHECKS_OF_TWO = {
    "zero3, cropping": (zero3, "cropping"),
    "zero3, llava": (zero3, "llava"),
    LOADED: (zero3_loaded, "llava"),
    FILES: (zero3_files, "llava"),
    BFLOAT16: (in_bfloat16, "llava"),
}
if not find_spec("deepspeed"):
    CHECKS_OF_TWO = {}
