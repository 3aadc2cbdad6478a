"""Which back end serves: C++ where it can be built, otherwise the reference, said in a warning."""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

from tests.servers import DEMO
from vllm_ms_models import kernels

SERVE = """
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM({model!r}, max_model_len=64, max_num_seqs=2)
    chat = [{{"role": "user", "content": "What is 12 + 7?"}}]
    print("ANSWER", llm.chat(chat, SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].text)
"""


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="VLLM_MS_KERNELS=cuda is unknown; set it to auto, cpp or reference"):
        kernels.choose("cpu")


def test_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the devices that it is made for; nothing of it runs here."""
    monkeypatch.delenv("VLLM_MS_KERNELS", raising=False)
    monkeypatch.setattr(ms.hal, "get_device_name", lambda number, target: "Ascend910B3")
    assert kernels.choose("ascend").name == "ascend"
    monkeypatch.setattr(ms.hal, "get_device_name", lambda number, target: "Ascend310P3")
    with pytest.raises(NotImplementedError, match=r"Ascend310P3 needs; serve on a 910B, or with VLLM_MS_DEVICE=cpu"):
        kernels.choose("ascend")
    monkeypatch.setenv("VLLM_MS_KERNELS", "cpp")
    with pytest.raises(ValueError, match="VLLM_MS_KERNELS=cpp is for CPUs; unset it, or set VLLM_MS_DEVICE=cpu"):
        kernels.choose("ascend")


@pytest.mark.parametrize(("wanted", "status"), [("auto", 0), ("cpp", 1)])
def test_without_a_compiler_the_reference_serves_unless_cpp_was_asked_for(
    tmp_path: Path, wanted: str, status: int
) -> None:
    script = tmp_path / "serve.py"
    script.write_text(SERVE.format(model=str(DEMO)))
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "VLLM_MS_CACHE_DIR": str(tmp_path / "cache"),
        "VLLM_MS_KERNELS": wanted,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    log = done.stdout + done.stderr
    assert done.returncode == status, log
    assert "There is no C++ compiler 'no-such-compiler'" in log
    assert ("ANSWER 19" in log) == (wanted == "auto")
    assert ("Serving with the much slower reference kernels instead." in log) == (wanted == "auto")
