"""The command as a user meets it: exit codes, one line on errors, JSON, files."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from spatial_tokens import SPProjector, SPProjectorConfig, __version__
from spatial_tokens.bench import names, options, suites
from spatial_tokens.checkpoint import to_llava_sp
from spatial_tokens.cli import main
from spatial_tokens.cli.output import print_wrapped
from spatial_tokens.presets import PRESETS

TINY = SPProjectorConfig(
    vision_hidden_size=6, text_hidden_size=10, grid_size=8, kernel_sizes=(4, 8), spatial_hidden_size=4,
    detail_kernel_size=4, spatial_head="linear",
)  # fmt: skip


LONG = "a" * 300


@pytest.fixture
def projector(tmp_path):
    made = SPProjector.from_config(TINY)
    made.save_pretrained(tmp_path / "own")
    return made


def run(capsys, *arguments, code=0):
    """Runs the command in this process: what it printed, and one line of error if it should fail."""
    try:
        given = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        given = exit_.code
    printed = capsys.readouterr()
    assert given == code, printed.err
    if code == 2:
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("spatial-tokens")
        return printed.err
    return printed.out


def test_demo_draws_its_own_picture(capsys, tmp_path):
    report = json.loads(run(capsys, "demo", "--preset", "llava-sp-cropping", "--output", tmp_path, "--json"))
    shapes = {stage["stage"]: stage["shape"] for stage in report["stages"]}
    assert shapes == {
        "picture": [336, 336, 3],
        "transform": [1, 3, 336, 336],
        "encoder layer -2": [1, 576, 192],
        "extractor": [1, 6, 64],
        "integrator": [1, 6, 128],
        "spatial head": [1, 6, 512],
        "patch head": [1, 576, 512],
        "whole projector": [1, 582, 512],
    }
    parts = [stage["parameters"] for stage in report["stages"]]
    assert sum(parts[3:7]) == parts[7]
    assert all(stage["milliseconds"] >= 0 for stage in report["stages"])
    assert report["pictures"] == [str(tmp_path / "windows-cropping.png"), str(tmp_path / "attention.png")]
    for picture in report["pictures"]:
        assert Image.open(picture).format == "PNG"


def test_demo_prints_a_table_and_where_to_go_next(capsys, tmp_path):
    printed = run(capsys, "demo", "--output", tmp_path, "--preset", "llava-sp-pooling")
    assert "1 x 582 x 512" in printed
    assert f"wrote {tmp_path / 'windows-pooling.png'}" in printed
    assert "no attention to draw" in printed
    assert "weights of encoder and projector are random, and the encoder is narrowed to 4 layers of width 192" in printed
    assert "next: " in printed


def test_demo_says_what_is_cut_off_a_wide_picture(capsys, tmp_path):
    Image.new("RGB", (640, 360), "red").save(tmp_path / "wide.png")
    printed = run(capsys, "demo", tmp_path / "wide.png", "--output", tmp_path)
    assert "640 x 360 pixels" in printed
    assert "the encoder sees its center, 336 x 336 after resizing: 44% is cut off at left and right" in printed
    assert "cut off" not in run(capsys, "demo", "--output", tmp_path)


def test_demo_takes_the_encoder_that_a_preset_is_made_for(capsys, tmp_path):
    report = json.loads(run(capsys, "demo", "--preset", "siglip-l-16-384", "--output", tmp_path, "--json"))
    shapes = {stage["stage"]: stage["shape"] for stage in report["stages"]}
    assert shapes["transform"] == [1, 3, 384, 384]
    assert shapes["encoder layer -2"] == [1, 576, 192]
    assert not any("grid" in note for note in report["notes"])


def test_sentences_are_broken_between_words_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    print_wrapped("the meaning of a-hyphenated-word stays")
    assert capsys.readouterr().out.splitlines() == ["the meaning of", "a-hyphenated-word", "stays"]


def test_demo_leaves_the_random_state_alone(capsys, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run(capsys, "demo", "--preset", "llava-sp-cropping", "--output", tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_demo_scales_sixteen_bits(capsys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("spatial_tokens.demo.stages._run_stages", lambda picture, *rest: (seen.append(picture), (picture, None))[1])
    Image.new("I;16", (20, 10), 128 * 256).save(tmp_path / "gray.png")
    run(capsys, "demo", tmp_path / "gray.png", "--output", tmp_path, "--json")
    assert seen[0].getpixel((0, 0)) == (128, 128, 128)


def test_demo_refuses_an_unknown_range(capsys, tmp_path):
    Image.new("F", (20, 10), 0.5).save(tmp_path / "float.tiff")
    assert "has pixels of mode F" in run(capsys, "demo", tmp_path / "float.tiff", "--output", tmp_path, code=2)


def test_demo_turns_the_picture_upright(capsys, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (120, 90)).save(tmp_path / "turned.jpg", exif=exif)
    report = json.loads(run(capsys, "demo", tmp_path / "turned.jpg", "--output", tmp_path, "--json"))
    assert report["stages"][0]["shape"] == [120, 90, 3]


def test_demo_fits_the_preset_to_another_grid_and_says_so(capsys, tmp_path):
    report = json.loads(run(capsys, "demo", "--encoder", "vit_tiny_patch16_224", "--output", tmp_path, "--json"))
    assert report["stages"][-1]["shape"] == [1, 4 + 196, 512]
    assert any("14 x 14 grid" in note and "(2, 6, 10, 14)" in note for note in report["notes"])


def test_demo_reads_another_grid_as_it_is_with_factorized_kernels(capsys, tmp_path):
    given = ("--encoder", "vit_tiny_patch16_224", "--preset", "factorized-cropping")
    report = json.loads(run(capsys, "demo", *given, "--output", tmp_path, "--json"))
    assert report["stages"][-1]["shape"] == [1, 6 + 196, 512]
    assert not any("grid" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jpg",), "cannot read the picture missing.jpg: No such file"),
        ((__file__,), "cannot read the picture"),
        (("--preset", "llava"), "unknown preset 'llava'"),
        (("--encoder", "nonsense"), "timm does not know a model 'nonsense'"),
        (("--output", __file__), "cannot make the directory"),
        (("--seed", "x"), "invalid int value: 'x'"),
        (("--seed", 2**64), "seed must be an integer from -2**63 to 2**64 - 1, got 18446744073709551616"),
        (("--seed", -(2**63) - 1), "seed must be an integer"),
        (("--encoder", ""), "timm does not know a model ''"),
        (("--output", ""), "--output must be a path, got an empty string"),
        ((LONG,), "File name too long"),
        (("a.jpg", "b.jpg"), "unrecognized arguments: b.jpg"),
    ],
)
def test_demo_mistakes(capsys, tmp_path, arguments, message):
    given = arguments if "--output" in arguments else (*arguments, "--output", tmp_path / "out")
    assert message in run(capsys, "demo", *given, code=2)


def test_demo_truncated_picture(capsys, tmp_path):
    Image.effect_noise((200, 200), 60).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    assert "cannot read the picture" in run(capsys, "demo", tmp_path / "cut.png", "--output", tmp_path, code=2)


@pytest.mark.parametrize("preset", PRESETS)
def test_info_of_every_preset(capsys, preset):
    config = SPProjectorConfig.from_preset(preset)
    told = json.loads(run(capsys, "info", preset, "--json", "--dtype", "float32"))
    assert SPProjectorConfig.from_json(json.dumps(told["config"])) == config
    assert told["parts"][-1]["parameters"] == config.num_parameters
    assert told["parts"][-1]["bytes"] == 4 * config.num_parameters
    printed = run(capsys, "info", preset)
    assert f"{config.num_parameters:,}" in printed
    assert f"{config.num_spatial_tokens} spatial + {config.num_patches} patch" in printed


def test_info_lists_the_presets(capsys):
    assert list(json.loads(run(capsys, "info", "--json"))) == list(PRESETS)
    printed = run(capsys, "info")
    assert all(name in printed for name in PRESETS)


def test_info_of_a_file_and_of_a_directory(capsys, tmp_path, projector):
    for path in (tmp_path / "own", tmp_path / "own" / "config.json"):
        assert json.loads(run(capsys, "info", path, "--json"))["config"]["kernel_sizes"] == [4, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the config is not valid JSON"),
        ("[]", "read from a dict of fields"),
        ('{"grid": 3}', "unknown field 'grid'"),
        ("{}", "missing field vision_hidden_size"),
    ],
)
def test_info_of_a_broken_config(capsys, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    assert message in run(capsys, "info", tmp_path / "config.json", code=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.json", "cannot read missing.json: No such file"),
        (f"{LONG}.json", "File name too long"),
        (LONG, "unknown preset 'aaa"),
        ("", "the config must be a path, got an empty string"),
        ("two\nlines\x1b.json", r"cannot read two\nlines\x1b.json"),
        ("zero\0.json", r"cannot read zero\x00.json"),
    ],
)
def test_info_of_a_missing_config(capsys, name, message):
    assert message in run(capsys, "info", name, code=2)


def test_info_of_json_of_another_kind_names_the_file(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": []}')
    message = run(capsys, "info", tmp_path, code=2)
    assert f"{tmp_path / 'config.json'} is no config of a projector: unknown field 'architectures'" in message


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("name", ["released.bin", "released.safetensors"])
def test_convert_there_and_back(capsys, tmp_path, projector, prefix, name):
    told = json.loads(run(capsys, "convert", tmp_path / "own", tmp_path / name, "--prefix", prefix, "--json"))
    assert told["config"] == json.loads(json.dumps(TINY.to_dict()))
    released = load_file(tmp_path / name) if name.endswith("safetensors") else torch.load(tmp_path / name, weights_only=True)
    assert released.keys() == to_llava_sp(projector, prefix=prefix).keys()
    assert "missing: conv_" in run(capsys, "convert", tmp_path / name, tmp_path / "again", code=2), "it is no grid of 24 x 24"
    assert "wrote" in run(capsys, "convert", tmp_path / name, tmp_path / "again", "--config", tmp_path / "own")
    again = SPProjector.from_pretrained(tmp_path / "again")
    assert again.config == TINY
    assert all(torch.equal(tensor, projector.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_convert_with_the_config_given(capsys, tmp_path, projector):
    save_file(to_llava_sp(projector), tmp_path / "released.safetensors")
    (tmp_path / "wide.json").write_text(SPProjectorConfig(**{**TINY.to_dict(), "grid_size": 12}).to_json())
    run(capsys, "convert", tmp_path / "released.safetensors", tmp_path / "wide", "--config", tmp_path / "wide.json")
    assert SPProjector.from_pretrained(tmp_path / "wide").config.grid_size == (12, 12)
    message = run(capsys, "convert", tmp_path / "released.safetensors", tmp_path / "no", "--config", "llava-sp-pooling", code=2)
    assert "missing: " in message
    assert not (tmp_path / "no").exists()


def test_convert_overwrites_only_when_told(capsys, tmp_path, projector):
    target = tmp_path / "released.bin"
    target.write_text("precious")
    assert "is already there" in run(capsys, "convert", tmp_path / "own", target, code=2)
    assert target.read_text() == "precious"
    run(capsys, "convert", tmp_path / "own", target, "--overwrite")
    assert "conv_4.weight" in torch.load(target, weights_only=True)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-3/optimizer.pt", "config.json"])
def test_convert_never_overwrites_files_of_others(capsys, tmp_path, projector, name):
    save_file(to_llava_sp(projector), tmp_path / "released.safetensors")
    arguments = ("convert", tmp_path / "released.safetensors", tmp_path / "out", "--config", tmp_path / "own", "--overwrite")
    run(capsys, *arguments)
    run(capsys, *arguments)
    precious = tmp_path / "out" / name
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("{}")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert f"files that the command does not write, {name.split('/')[0]}; move" in run(capsys, *arguments, code=2)
    assert precious.read_text() == "{}"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_convert_mistakes(capsys, tmp_path, projector):
    own, released = tmp_path / "own", tmp_path / "released.bin"
    run(capsys, "convert", own, released)
    (tmp_path / "cut.bin").write_bytes(released.read_bytes()[:400])
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((own, tmp_path / "out"), "OUT must end in .safetensors or .bin"),
        ((released, tmp_path / "out.bin"), "OUT must not be a file's name"),
        ((tmp_path / "cut.bin", tmp_path / "out"), "is not a complete PyTorch file"),
        ((tmp_path / "empty", tmp_path / "out"), "no weights in"),
        ((tmp_path / "missing.bin", tmp_path / "out"), "does not exist"),
        ((own, tmp_path / "missing" / "out.bin"), "cannot write"),
        ((own, tmp_path / "out.bin", "--prefix", "x."), "--prefix must be 'base_model.model.model.', 'model.' or '', got 'x.'"),
        ((LONG, tmp_path / "out"), "does not exist"),
        ((released, tmp_path / LONG), "File name too long"),
        ((own, tmp_path / f"{LONG}.bin"), "File name too long"),
        ((released, tmp_path / "out", "--base", ""), "--base must be a path, got an empty string"),
        (("", tmp_path / "out"), "IN must be a path, got an empty string"),
        ((released, ""), "OUT must be a path, got an empty string"),
        ((own, own, "--overwrite"), "IN and OUT are both"),
    ]:
        assert message in run(capsys, "convert", *arguments, code=2)
    assert {path.name for path in tmp_path.iterdir()} == {"own", "released.bin", "cut.bin", "empty"}


def test_convert_refuses_what_the_released_names_cannot_hold(capsys, tmp_path):
    SPProjector.from_config(SPProjectorConfig(**{**TINY.to_dict(), "spatial_head": "mlp"})).save_pretrained(tmp_path / "mlp")
    assert "save_pretrained holds every projector" in run(capsys, "convert", tmp_path / "mlp", tmp_path / "out.bin", code=2)


@pytest.mark.parametrize("command", ["demo", "info", "convert", "serve-export"])
def test_every_command_has_help_with_an_example(capsys, command):
    printed = run(capsys, command, "--help")
    assert f"example:\n  spatial-tokens {command} " in printed
    assert "--json" in printed


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_mistakes_in_the_words(capsys, arguments):
    assert "--help" in run(capsys, *arguments, code=2)


def test_info_prints_a_table_that_is_aligned_and_whole(capsys):
    """Whatever the terminal's width, and with no library for it."""
    lines = run(capsys, "info", "llava-sp-cropping", "--dtype", "float32").splitlines()
    config = SPProjectorConfig.from_preset("llava-sp-cropping")
    rows = lines[2 : 2 + 2 + len(config.costs()) + 1]
    assert lines[0] == "llava-sp-cropping, in float32, multiply-adds of one image"
    assert rows[0].split() == ["part", "parameters", "MiB", "multiply-adds"]
    assert {len(row) for row in rows} == {len(rows[0])}
    for row, cost in zip(rows[2:], config.costs(bytes_per_parameter=4), strict=False):
        assert row.startswith(f"{cost.part}  ")
        assert row.split()[-4:-2] == [f"{cost.parameters:,}", f"{cost.bytes / 2**20:,.1f}"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), ([], 2), (["nonsense"], 2), (["demo", "--help"], 0), (["bench", "--suite", "no"], 2),
     (["info"], 0), (["info", "llava-sp-cropping"], 0), (["info", "nonsense"], 2), (["info", "missing.json"], 2)],
)  # fmt: skip
def test_what_needs_no_torch_does_not_import_it(arguments, code):
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'rich', 'numpy', 'transformers', 'PIL']))\n"
        f"from spatial_tokens.cli import main; raise SystemExit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_the_names_of_suites_and_dtypes_are_those_that_there_are():
    assert tuple(suites.SUITES) == names.SUITES
    assert [str(dtype) for dtype in options.DTYPES.values()] == [f"torch.{name}" for name in names.DTYPES]


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"]])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output_is_an_error(capsys, monkeypatch, arguments):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(arguments) == 2
    assert "cannot use standard output: No space left on device" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_error_that_cannot_be_written_is_still_an_exit_code(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["info", "nonsense"]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "nonsense"]) == 2


def test_a_closed_standard_output_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 2
    assert "standard output is closed" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_none(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", "--json"]) == 0


def test_what_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, projector):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_convert = ["convert", str(tmp_path / "own"), str(tmp_path / "é.bin")]
    assert main(run_convert) == 0
    assert rb"\xe9.bin: vision_hidden_size=6" in written.getvalue()
    assert terminal.errors == "strict"
    assert main(["info"]) == 0  # a table without the lines that ASCII lacks
    assert written.getvalue().count(b"\\") == 1


def test_ctrl_c_that_a_library_passes_over_is_no_traceback(monkeypatch):
    def fail(arguments):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("spatial_tokens.cli.info.run", fail)
    assert main(["info"]) == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "program", [["-m", "spatial_tokens"], ["-c", "from spatial_tokens.cli import main; raise SystemExit(main())"]]
)
def test_ctrl_c_while_torch_is_imported(tmp_path, program):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, *program, "demo"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_installed_command():
    command = Path(sys.executable).with_name("spatial-tokens")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"spatial-tokens {__version__}\n"
