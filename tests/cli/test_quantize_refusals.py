"""What `vllm-ms quantize` refuses, in a sentence, and what it leaves behind when it does not come to its end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.cli.quantizing import SIZES, prompts_file, quantize, tensors
from tests.pooling.encoders import encoder, save_encoder
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.cli import main
from vllm_ms_models.cli.quantize.source import open_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source() -> Path:
    return checkpoints.checkpoint("llama", **SIZES)


def refusal(capsys: pytest.CaptureFixture[str], *words: object, code: int = 1) -> str:
    """What is printed; it is one sentence, and nothing is written."""
    out = Path(str(words[1]))
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    command = ["quantize", *map(str, words)]
    if code == 2:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
    else:
        assert main(command) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.strip().endswith(".")
    assert sorted(out.parent.iterdir()) == before
    return error


@pytest.mark.parametrize("kind", ["empty", "full", "file", "dangling"])
def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "full":
            (out / "mine").write_text("mine")
    assert "exists already" in refusal(capsys, source, out, "--scheme", "w8a8-dynamic")
    assert out.is_symlink() or out.is_file() or [p.name for p in out.iterdir()] == ["mine"] * (kind == "full")


def test_the_folder_above_must_exist(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(source), str(tmp_path / "a" / "b"), "--scheme", "w8a8-dynamic"]) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--scheme", "w8a8-static"], "--scheme w8a8-static needs the ranges of activations"),
        (["--scheme", "w8a8-dynamic", "--smoothquant", "0.5"], "--smoothquant needs"),
        (["--scheme", "w4a16", "--format", "modelslim"], "use --format compressed-tensors"),
        (["--scheme", "w4a16", "--lm-head"], "--lm-head is for"),
        (["--scheme", "w4a16", "--smoothquant", "0.5", "--calibration", "x"], "--smoothquant is for int8"),
    ],
)
def test_options_that_do_not_go_together(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    assert part in refusal(capsys, source, tmp_path / "out", *options, code=2)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--ignore", "*.experts.*"], "'*.experts.*' matches no linear"),
        (["--ignore", "re:layers"], "'re:layers' matches no linear"),  # from the name's beginning
        (["--ignore", "re:("], "is not a regular expression"),
        (["--ignore", "*.q_proj"], "but not model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, with"),
        (["--ignore", "model.layers.1.mlp.up_proj"], "but not model.layers.1.mlp.gate_proj, with"),
        (["--ignore", "*"], "leaves every linear in floats"),
        (["--ignore", "lm_*", "--lm-head"], "leave one of them out"),
    ],
)
def test_patterns(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], part: str
) -> None:
    assert part in refusal(capsys, source, tmp_path / "out", "--scheme", "w8a8-dynamic", *options)


def test_no_group_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = checkpoints.checkpoint("llama", **(SIZES | {"intermediate_size": 100}))
    error = refusal(capsys, odd, tmp_path / "out", "--scheme", "w4a16")
    assert "model.layers.0.mlp.down_proj" in error and "no multiple of 16" in error
    out = quantize(odd, tmp_path / "out", "--scheme", "w4a16", "--ignore", "*.down_proj", calibrated=False)
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    assert described["ignore"] == [*names, "lm_head"]
    assert described["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert all(tensors(out)[f"{name}.weight"].dtype == torch.float32 for name in names)


@pytest.mark.parametrize("format", ["compressed-tensors", "modelslim"])
def test_quantized_already(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    once = quantize(source, tmp_path / "once", "--scheme", "w8a8-dynamic", "--format", format, calibrated=False)
    assert "is quantized already" in refusal(capsys, once, tmp_path / "twice", "--scheme", "w8a8-dynamic")


def changed(source: Path, folder: Path, **values: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"architectures": ["GptForCausalLM"]}, "has no MindSpore implementation here"),
        ({"architectures": None}, "names no architecture"),
        ({"intermediate_size": 48}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks"),
    ],
)
def test_a_config_that_does_not_fit(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict, part: str
) -> None:
    other = changed(source, tmp_path / "source", **values)
    assert part in refusal(capsys, other, tmp_path / "out", "--scheme", "w8a8-dynamic")


def test_mixtures_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.checkpoint("mixtral", num_local_experts=4)
    error = refusal(capsys, source, tmp_path / "out", "--scheme", "w8a8-dynamic")
    assert "MixtralForCausalLM is a mixture of experts, which vllm-ms quantize cannot quantize yet" in error


def test_an_encoder_is_not_smoothed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scheme", "w8a8-dynamic", "--smoothquant", "0.5", "--calibration", prompts_file(tmp_path)]
    error = refusal(capsys, save_encoder(encoder("bert")), tmp_path / "out", *options)
    assert "--smoothquant is not possible for BertModel, whose norms feed the residual sum too; leave it out." in error


def test_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was written until then is removed."""
    model = checkpoints.random_model("llama", **SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "source")
    for scheme in ("w8a8-dynamic", "w4a16"):
        error = refusal(capsys, tmp_path / "source", tmp_path / "out", "--scheme", scheme)
        assert "model.layers.1.mlp.up_proj.weight" in error and "not numbers" in error


def test_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out", "--scheme", "w8a8-dynamic")
    (tmp_path / "folder").mkdir()
    assert "config.json" in refusal(capsys, tmp_path / "folder", tmp_path / "out", "--scheme", "w8a8-dynamic")


def test_what_is_kept_and_what_is_not(source: Path, tmp_path: Path) -> None:
    """Links of a hub's snapshot become files; weights of other formats and old indexes stay behind."""
    folder = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(source, folder)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (tmp_path / "models--org--name" / "blobs" / "blob").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/blob")
    kept = ("vocab.txt", "chat_template.jinja", "LICENSE", "README.md", "tokenizer.model")
    left = ("pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes", "optimizer.pt")
    for name in kept + left:
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    out = quantize(folder, tmp_path / "out", "--scheme", "w8a8-dynamic", calibrated=False)
    names = {path.name for path in out.iterdir()}
    assert {*kept, "tokenizer.json", "generation_config.json"} <= names and not names & {*left, "original"}
    assert not any(path.is_symlink() for path in out.iterdir())
    assert all((out / name).read_text() == name for name in kept)


def test_a_link_out_of_the_folder_is_not_copied(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "source" / "NOTICE.txt").symlink_to("../secret")
    said = refusal(capsys, tmp_path / "source", tmp_path / "out", "--scheme", "w8a8-dynamic")
    assert "NOTICE.txt is a symbolic link to" in said and "outside of the model folder" in said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_ended_midway(source: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Only after SIGKILL something is left, which nothing takes for a model: it has no config.json."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "vllm_ms_models.cli",
        "quantize",
        str(source),
        str(out),
        "--scheme",
        "w8a8-dynamic",
    ]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not (left := list(tmp_path.iterdir())) and child.poll() is None:
            time.sleep(0.0005)
        os.kill(child.pid, number)
        assert child.wait(60) not in (0, None)
    finally:
        child.kill()
        child.wait()
    assert left == [tmp_path / f".out.partial-{child.pid}"]
    assert not out.exists()
    if number != signal.SIGKILL:
        assert not left[0].exists()
        return
    with pytest.raises(CheckpointError):
        open_source(str(left[0]))
    assert not (left[0] / "config.json").exists()
