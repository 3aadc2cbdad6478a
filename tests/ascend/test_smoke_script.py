"""examples/ascend_smoke.sh, the first things to run on real hardware: its steps, its report, and that it always ends.

Nothing here runs on the hardware. Quick tests put a program of their own in the place of `vllm`, because they are about
the script; the slow one has real servers, where those for Ascend are CPU servers with other kernels.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.servers import DEMO

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "ascend_smoke.sh"

# What answers in the place of a server; on "Ascend" as `there` says.
ANSWERING = """#!{python}
import http.server, json, os, sys
there = os.environ["VLLM_MS_DEVICE"] == "ascend"
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self): self.answer({{}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        tokens = {there} if there else [5, 6, 7]
        top = [{{"token_id:%d" % token: -0.5, "token_id:9": -0.6}} for token in tokens]
        logprobs = {{"token_logprobs": [-0.5] * 3, "top_logprobs": top}}
        self.answer({{"choices": [{{"token_ids": tokens, "logprobs": logprobs}}]}})
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def helper() -> Any:
    spec = importlib.util.spec_from_file_location("ascend_smoke", EXAMPLES / "ascend_smoke.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_vllm(folder: Path, program: str) -> dict[str, str]:
    """An environment where `vllm` is that program."""
    folder = folder / "bin"
    folder.mkdir()
    path = folder / "vllm"
    path.write_text(program)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


def started(folder: Path, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), *options, "--report", str(folder / "report")],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ran(folder: Path, env: dict[str, str], *options: str, seconds: float = 60) -> tuple[int, list[str]]:
    """The exit code, and the lines without how long each step took."""
    process = started(folder, env, *options)
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, [line.rpartition(", ")[0] for line in said.splitlines()[:-1]]


def test_the_script_is_well_formed() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    run = subprocess.run([*checker, str(SCRIPT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--fast"], "--fast is not an option; see --help."),
        (["--only", "operators,drivers"], "drivers is not a step; there are environment device operators collectives"),
        (["--timeout", "soon"], "--timeout soon is not a number of seconds."),
        (["--model", "/nowhere"], "--model /nowhere has no config.json."),
        (["--model"], "--model needs a value; see --help."),
    ],
)
def test_options_that_make_no_sense(options: list[str], sentence: str) -> None:
    run = subprocess.run([str(SCRIPT), *options], capture_output=True, text=True, timeout=30)
    assert run.returncode == 2 and run.stderr.startswith(sentence)


def test_without_ascend_what_needs_it_is_skipped(tmp_path: Path) -> None:
    """And a server that ends is a failure, of which the report has the last lines."""
    message = f"serving on {socket.gethostname()}, 10.1.2.3, token=abcdefgh"
    env = with_vllm(tmp_path, f"#!/bin/sh\necho '{message}'\nexit 3\n")
    steps = "device,checkpoint,serve-cpu,serve-ascend,graphs,two-devices,two-devices-graphs,w8a8,timing"
    code, lines = ran(tmp_path, env, "--model", str(DEMO), "--only", steps)
    assert lines == [
        "SKIP  device (this host has no Ascend device)",
        "PASS  checkpoint",
        "FAIL  serve-cpu (serving on <name>, <address>, token=<secret>)",
        "SKIP  serve-ascend (this host has no Ascend device)",
        "SKIP  graphs (this host has no Ascend device)",
        "SKIP  two-devices (this host has no 2 Ascend devices)",
        "SKIP  two-devices-graphs (this host has no 2 Ascend devices)",
        "SKIP  w8a8 (this host has no Ascend device)",
        "SKIP  timing (no server has answered)",
    ]
    report = (tmp_path / "report").read_text()
    assert code == 1 and "=== serve-cpu: FAIL" in report and "vllm serve ended with 3" in report
    assert socket.gethostname() not in report and "10.1.2.3" not in report and "abcdefgh" not in report


@pytest.mark.parametrize(
    ("there", "status", "line"),
    [
        ("[5, 6, 7]", "PASS", "12 of 12 tokens are the same before the first that differs; log-probabilities 0 apart"),
        ("[5, 9, 7]", "FAIL", "prompt_7.json: token 2 is another, and the first one's log-probability is inf lower"),
    ],
)
def test_answers_are_compared(tmp_path: Path, there: str, status: str, line: str) -> None:
    env = with_vllm(tmp_path, ANSWERING.format(python=sys.executable, there=there)) | {"ASCEND_SMOKE_DEVICES": "2"}
    steps = "checkpoint,serve-cpu,serve-ascend,graphs,two-devices,two-devices-graphs,timing"
    code, lines = ran(tmp_path, env, "--model", str(DEMO), "--only", steps)
    found = [text.split(" (")[0] for text in lines]
    assert found == [
        "PASS  checkpoint",
        "PASS  serve-cpu",
        f"{status}  serve-ascend",
        f"{status}  graphs",
        f"{status}  two-devices",
        f"{status}  two-devices-graphs",
        "PASS  timing",
    ]
    report = (tmp_path / "report").read_text()
    assert line in report and "two: 8 at once: " in report and code == (status == "FAIL")
    assert "--tensor-parallel-size 2" in report


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("told", [None, signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_never_ready_is_ended(tmp_path: Path, told: signal.Signals | None) -> None:
    """With what it has started, when its time is over or the script is told to stop."""
    pids = tmp_path / "pids"
    env = with_vllm(tmp_path, f"#!/bin/sh\nsleep 600 &\necho $$ $! >{pids}.part\nmv {pids}.part {pids}\nwait\n")
    seconds = "600" if told else "2"
    options = ("--model", str(DEMO), "--only", "checkpoint,serve-cpu", "--timeout", seconds)
    process = started(tmp_path, env, *options)
    end = time.monotonic() + 30
    while not pids.exists() and time.monotonic() < end:
        time.sleep(0.1)
    if told:
        process.send_signal(told)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if told else 1)
    assert told or "FAIL  serve-cpu (not healthy after 2 s)" in said
    given = [int(pid) for pid in pids.read_text().split()]
    end = time.monotonic() + 5
    while alive(given) and time.monotonic() < end:  # what is killed takes a moment to end
        time.sleep(0.05)
    assert not alive(given)
    assert "PASS  checkpoint" in (tmp_path / "report").read_text()


def test_what_a_report_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "npu-07.lab")
    monkeypatch.setenv("USER", "mira")
    monkeypatch.setenv("HOME", "/home/mira")
    hidden = helper().hidden
    for line, want in [
        ("on npu-07.lab, npu-07 by mira in /home/mira/x", "on <name>, <name> by <name> in ~/x"),
        ("HCCL_IF_IP=10.1.2.3 (10.1.2.4)", "HCCL_IF_IP=<address> (<address>)"),
        ("http://192.168.7.1:8000 and 127.0.0.1:8000, 0.0.0.0", "http://<address>:8000 and 127.0.0.1:8000, 0.0.0.0"),
        ("fe80::1ff:fe23:4567:890a at 12:34:56, 02:42:ac:11:00:02", "<address> at 12:34:56, <address>"),
        ("HF_TOKEN=hf_abcdefghijkl, sk-abcdefghijkl", "HF_TOKEN=<secret>, <secret>"),
        ('"api_key": "0123456789"', '"api_key": "<secret>"'),
        ("CANN 8.5.0, driver 25.5.0, nvidia-cudnn==9.20.0.48", "CANN 8.5.0, driver 25.5.0, nvidia-cudnn==9.20.0.48"),
        ("off by 0.3 roundings, 4 allowed; 64 tokens: 0.25", "off by 0.3 roundings, 4 allowed; 64 tokens: 0.25"),
    ]:
        assert hidden(line) == want


def choice(tokens: list[int], logprobs: list[float], top: dict[str, float] | None = None) -> dict[str, Any]:
    return {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs, "top_logprobs": [top or {}] * len(tokens)}}


def test_what_agrees() -> None:
    agreement = helper().agreement
    theirs = choice([1, 2, 3], [-0.1, -0.2, -0.3])
    assert agreement(choice([1, 2, 3], [-0.1, -0.25, -0.3]), theirs) == (3, pytest.approx(0.05), 0.0)
    other = choice([1, 4, 3], [-0.1, -0.2, -9], {"token_id:4": -0.2, "token_id:2": -0.5})
    assert agreement(other, theirs) == (
        1,
        0.0,
        pytest.approx(0.3),
    )  # what comes after the first difference is another text
    assert agreement(choice([1, 4, 3], [-0.1, -0.2, -9], {"token_id:4": -0.2}), theirs)[2] == float("inf")


def test_the_checkpoint_suits_the_operators(tmp_path: Path) -> None:
    """Heads of a multiple of 16, keys shared by heads and divided by two ranks, bfloat16, a tokenizer."""
    module = helper()
    assert module.checkpoint(str(tmp_path / "model")) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["hidden_size"] // config["num_attention_heads"] == 64
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert module.requests(str(tmp_path), str(tmp_path / "model")) == 0
    bodies = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(len(body["prompt"]) for body in bodies) == sorted([*module.LENGTHS, 32])


RANK = """
import sys
import torch.distributed as dist
import mindspore as ms
ms.set_device("CPU")
ms.runtime.launch_blocking()
from tests.ascend.test_smoke_script import helper
from vllm_ms_models import compat
from vllm_ms_models.bridge.ranks import TorchGroup
compat.absorb_numpy_warning()
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], world_size=2, rank=int(sys.argv[2]))
raise SystemExit(helper().compared(TorchGroup(int(sys.argv[2]), 2, dist.group.WORLD)))
"""


@pytest.mark.slow
def test_collectives_are_compared(tmp_path: Path) -> None:
    """What is expected of devices, of processes on a CPU."""
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, number], cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True) for number in "01"
    ]
    for number, process in enumerate(ranks):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert f"rank {number}: all_to_all, bfloat16: ok" in said and said.count(": ok") == 12


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_script_with_real_servers(tmp_path: Path) -> None:
    """All steps but those of the devices alone; "Ascend" is the kernels for any CPU, which round as others do not."""
    vllm = Path(sys.executable).with_name("vllm")
    program = (
        f'#!/bin/sh\n[ "$VLLM_MS_DEVICE" = cpu ] || export VLLM_MS_ISA=portable\nVLLM_MS_DEVICE=cpu exec {vllm} "$@"\n'
    )
    env = with_vllm(tmp_path, program) | {"ASCEND_SMOKE_DEVICES": "2"}
    code, lines = ran(tmp_path, env, "--work", str(tmp_path / "work"), seconds=1400)
    assert [line.split(" (")[0] for line in lines] == [
        "PASS  environment",
        "FAIL  device",
        "PASS  operators",
        "FAIL  collectives",
        "PASS  checkpoint",
        "PASS  serve-cpu",
        "PASS  serve-ascend",
        "PASS  graphs",
        "PASS  two-devices",
        "PASS  two-devices-graphs",
        "PASS  w8a8",
        "PASS  timing",
    ]
    assert code == 1 and "Unsupported device target Ascend" in lines[1]
    assert "kernels: C++ (portable" in (tmp_path / "report").read_text()
