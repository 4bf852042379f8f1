"""The words of the command line: commands, options, help. Needs no torch."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn, get_args

from spatial_tokens import __version__
from spatial_tokens.bench.names import DTYPES, MINUTES, SUITES
from spatial_tokens.cli.info import BYTES
from spatial_tokens.demo.scene_text import UNSEEN_NAMES
from spatial_tokens.errors import on_one_line, shown
from spatial_tokens.grid import SpatialBasis, is_positive_int


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Lets the error of a full disk out, which argparse ignores, so that no help or version is lost in silence."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {on_one_line(message)}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of `spatial-tokens`; each command leaves the name of its function, `module:function`, in `run`."""
    parser = _Parser(prog="spatial-tokens", description="Visual spatial tokens for vision-language models (LLaVA-SP).")
    parser.add_argument("--version", action="version", version=f"spatial-tokens {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    demo = _command(
        subparsers,
        "demo",
        "demo:run",
        "ask a small trained model about a scene, without and with spatial tokens; or run a projector on a picture",
        'demo --scene "green circle top left, large blue ring right"\n  spatial-tokens demo photo.jpg --preset llava-sp-pooling',
    )
    demo.add_argument("image", nargs="?", metavar="IMAGE", help="show what each stage of a (random) projector makes of a picture")
    demo.add_argument(
        "--scene",
        metavar="WORDS",
        help="what to draw: things between commas, each with color, shape, place (default: drawn from the seed). "
        f"The training pictures had no {', no '.join(UNSEEN_NAMES)}",
    )
    demo.add_argument("--prompt", help="an additional question; or what to ask --model (default: What is in this picture?)")
    demo.add_argument("--preset", help="the projector (default: llava-sp-cropping); see: spatial-tokens info")
    demo.add_argument("--encoder", metavar="NAME", help="a timm model (default: CLIP ViT-L/14-336, narrowed to run in seconds)")
    demo.add_argument("--full-size", action="store_true", help="the paper's widths; about 6 GB of memory")
    demo.add_argument("--pretrained", action="store_true", help="load the encoder's weights from the hub (random otherwise)")
    demo.add_argument("--model", metavar="tiny|HUB_ID", help="show a vision-language model without and with spatial tokens instead")
    demo.add_argument("--output", default="spatial-tokens-demo", metavar="DIR", help="where the PNGs go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the scene, or of random weights (default: %(default)s)")

    info = _command(subparsers, "info", "info:run", "print a projector's sizes and costs", "info llava-sp-cropping --dtype float32")
    info.add_argument(
        "config", nargs="?", metavar="PRESET|config.json", help="a preset, or a config's path; without one, lists the presets"
    )
    info.add_argument(
        "--dtype", choices=BYTES, default="bfloat16", help="of the parameters, for their bytes (default: %(default)s)"
    )

    _add_probe(subparsers)
    bench = _command(
        subparsers,
        "bench",
        "bench:run_bench",
        "measure the operators, projectors and models on this machine",
        "bench --suite kernels --batch 1 --json kernels.json\n  spatial-tokens bench compare before.json after.json",
        json=False,
    )
    bench.add_argument(
        "--suite",
        choices=SUITES,
        help="one of them (default: all, one after another; the progress bar shows about how much time is left); estimated minutes "
        f"on two CPU cores: {', '.join(f'{name} {minutes}' for name, minutes in MINUTES.items())}; in all {sum(MINUTES.values())}",
    )
    bench.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    bench.add_argument("--dtype", choices=DTYPES, help="of weights and features (default: float32 and bfloat16)")
    bench.add_argument("--batch", type=_positive, metavar="N", help="images at once (default: the suite's own choice)")
    bench.add_argument("--json", metavar="FILE", help="write machine, versions and rows")
    bench.add_argument("--plots", metavar="DIR", help="draw each suite into a PNG")
    actions = bench.add_subparsers(dest="action", metavar="[compare]", parser_class=_Parser)
    compare = _command(
        actions,
        "compare",
        "bench:run_compare",
        "show the times of two reports as ratios",
        "bench compare a.json b.json",
        json=False,
    )
    compare.add_argument("before", metavar="A.json")
    compare.add_argument("after", metavar="B.json")

    convert = _command(
        subparsers,
        "convert",
        "convert:run",
        "convert released LLaVA-SP checkpoints to this library's format or a Hugging Face model, or back",
        "convert mm_projector.bin projector\n  spatial-tokens convert projector released.safetensors --prefix model.\n"
        "  spatial-tokens convert llava-sp-lora llava-sp-hf --base vicuna-7b-v1.5",
    )
    convert.add_argument("input", metavar="IN", help="a released file, index or folder; or a directory of this library's format")
    convert.add_argument("output", metavar="OUT", help="a directory; or, on the way back, a .safetensors or .bin file")
    convert.add_argument(
        "--base", metavar="DIR", help="make a whole Hugging Face LLaVA of a released folder: the language model it was trained on"
    )
    convert.add_argument("--vision", metavar="DIR", help="with --base: the vision tower (default: what the folder's config names)")
    convert.add_argument("--config", metavar="PRESET|config.json", help="what a released checkpoint must hold (inferred otherwise)")
    convert.add_argument("--prefix", default="", metavar="PREFIX", help="on the way back: the names' prefix")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it is there and holds nothing else")
    _add_compress(subparsers)
    export = _command(
        subparsers,
        "export",
        "export:run",
        "write a projector as an ONNX model, or as a program or a compiled package of torch's",
        "export projector projector.onnx\n  spatial-tokens export projector projector.pt2 --compile",
    )
    export.add_argument("input", metavar="IN", help="a directory of this library's format")
    export.add_argument("output", metavar="OUT", help="a .onnx file; or a .pt2 file, which torch.export.load reads")
    export.add_argument("--compile", action="store_true", help="an AOTInductor package, for this kind of machine; a .pt2 file too")
    export.add_argument("--dtype", choices=DTYPES, help="of the program (default: the dtype of IN; ONNX: float32 or float16)")
    export.add_argument("--grid", type=_positive, nargs=2, metavar=("H", "W"), help="of factorized kernels: the patch grid to read")
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    serve = _command(
        subparsers,
        "serve-export",
        "serve_export:run",
        "write a base model and an adapter as one folder that `vllm serve` takes",
        "serve-export llava-1.5-7b-hf my-adapter served && vllm serve served",
    )
    serve.add_argument("base", metavar="BASE", help="the base model's folder")
    serve.add_argument("adapter", metavar="ADAPTER", help="what save_adapter wrote")
    serve.add_argument("output", metavar="OUT", help="the folder to write; an earlier export is replaced")
    serve.add_argument("--link", action="store_true", help="link to the base's files instead of copying them")
    return parser


def _add_probe(subparsers: Any) -> None:
    probe = _command(
        subparsers,
        "probe",
        "probe:run",
        "measure how well an encoder's features encode patch places, layer by layer, to see whether spatial tokens can help",
        "probe vit_large_patch14_clip_quickgelu_336.openai --images photos\n"
        "  spatial-tokens probe llava-hf/llava-1.5-7b-hf --images photos",
    )
    probe.add_argument(
        "encoder",
        metavar="ENCODER",
        help="a timm model (NAME or timm/NAME), or a vision or vision-language model of transformers (a folder, or owner/name)",
    )
    probe.add_argument("--images", metavar="DIR", help="a folder of pictures, some hundred or more (default: generated ones)")
    probe.add_argument("--limit", type=_positive, metavar="N", help="use at most so many pictures (default: 400)")
    probe.add_argument(
        "--layer", type=int, metavar="N", help="the hidden state that the projector reads (default: -2, the paper's)"
    )
    probe.add_argument("--image-size", type=_positive, metavar="N", help="of a timm model: pixels a side (default: its own)")
    probe.add_argument("--random-weights", action="store_true", help="of a timm model: load no weights")
    probe.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    probe.add_argument("--seed", type=int, default=0, help="of shifts, intervals and random weights (default: %(default)s)")
    probe.add_argument(
        "--output", default="spatial-tokens-probe", metavar="DIR", help="where probe.json and probe.png go (default: %(default)s)"
    )


def _add_compress(subparsers: Any) -> None:
    compress = _command(
        subparsers,
        "compress",
        "compress:run",
        "make a dense projector small: factorized kernels whose tokens are nearly the same, or kernels in 8 bits",
        "compress projector small --images photos --encoder vit_large_patch14_clip_quickgelu_336.openai\n"
        "  spatial-tokens compress projector small --features features.safetensors --error 0.05",
    )
    compress.add_argument("input", metavar="IN", help="a dense projector: a directory of this library's format, or a released file")
    compress.add_argument("output", metavar="OUT", help="the directory to write, with a report and its plot beside the weights")
    source = compress.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="a folder of pictures; some hundred or more")
    source.add_argument("--features", metavar="FILE", help="a safetensors file of their patch features (n, N, C) instead")
    source.add_argument("--int8", action="store_true", help="keep the kernels dense, in 8 bits (torchao); needs no features")
    compress.add_argument(
        "--encoder", metavar="NAME", help="with --images: a timm model, or a vision model of transformers (a folder, or owner/name)"
    )
    compress.add_argument("--layer", type=int, metavar="N", help="the encoder's hidden state (default: -2, the paper's)")
    compress.add_argument("--limit", type=_positive, metavar="N", help="use at most so many pictures (default: 1000)")
    size = compress.add_mutually_exclusive_group()
    size.add_argument("--rank", type=_positive, metavar="N", help="channels that the kernels see (default: 128)")
    size.add_argument("--parameters", type=_positive, metavar="N", help="choose the best kernels of at most so many parameters")
    size.add_argument(
        "--error", type=float, metavar="SHARE", help="choose the smallest of those tried that miss at most this share of variance"
    )
    compress.add_argument(
        "--frequencies",
        type=_numbers,
        metavar="N[,N...]",
        help="maps of each side of a window, of all kernels or of each (default: 3), or the most that are tried (5)",
    )
    compress.add_argument(
        "--basis",
        choices=get_args(SpatialBasis),
        help="the maps on each window: fixed cosines, or learned from the features (default: cosine)",
    )
    compress.add_argument("--device", metavar="DEVICE", help="where to compute (default: cpu)")
    compress.add_argument("--overwrite", action="store_true", help="replace OUT if it is there and holds nothing else")


def _command(subparsers: Any, name: str, run: str, purpose: str, example: str, *, json: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=f"example:\n  spatial-tokens {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _numbers(text: str) -> int | tuple[int, ...]:
    numbers = tuple(map(_positive, text.split(",")))
    return numbers if len(numbers) > 1 else numbers[0]


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not is_positive_int(int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {shown(text)}")
    return int(text)
