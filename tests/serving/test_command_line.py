"""vLLM's other front ends, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import DEMO

pytestmark = pytest.mark.serving

OFFLINE = """
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM({model!r}, max_model_len=256, max_num_seqs=4)
    chat = [{{"role": "user", "content": "What is 12 + 7?"}}]
    print("ANSWER", llm.chat(chat, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text)
"""


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.feature("offline LLM", families=["qwen2"])
@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_offline_llm_in_one_process_and_in_two(tmp_path: Path, multiprocessing: str) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE.format(model=str(DEMO)))
    done = run(sys.executable, str(script), env={"VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing})
    assert "ANSWER 19" in done.stdout
    assert "Traceback" not in done.stderr  # also a clean shutdown
