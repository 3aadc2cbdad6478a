"""How vLLM starts its engine: forked from its own commands, which have no MindSpore; spawned by everybody else."""

import os
import subprocess
import sys

import pytest

ASK = "from vllm_ms_models.processes import start_method; print(start_method())"


def answer(before: str = "", env: dict[str, str] | None = None) -> str:
    """What a program is told that does `before`."""
    rest = {name: value for name, value in os.environ.items() if name != "VLLM_WORKER_MULTIPROC_METHOD"}
    command = [sys.executable, "-c", f"{before}\n{ASK}"]
    return subprocess.run(command, capture_output=True, text=True, env=rest | (env or {}), check=True).stdout.strip()


def test_a_program_of_somebody_else() -> None:
    assert answer() == "spawn"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_the_user_set(method: str) -> None:
    assert answer(env={"VLLM_WORKER_MULTIPROC_METHOD": method}) == method


def test_what_a_program_set_for_itself_is_what_it_gets_where_that_is_spawn() -> None:
    assert answer("import os; os.environ['VLLM_WORKER_MULTIPROC_METHOD'] = 'spawn'") == "spawn"


COMMAND = "import sys; sys.modules['__main__'].__file__ = '/some/bin/vllm'"


def test_the_command() -> None:
    assert answer(COMMAND) == answer(f"{COMMAND}; import os; os.environ['VLLM_WORKER_MULTIPROC_METHOD'] = 'spawn'")
    assert answer(COMMAND) == "fork"
    assert answer(COMMAND, {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}) == "spawn"


@pytest.mark.parametrize(
    "before",
    [
        "import sys; sys.modules['mindspore'] = sys",
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    ],
    ids=["MindSpore", "a thread"],
)
def test_no_fork_that_could_hang(before: str) -> None:
    assert answer(f"{COMMAND}; {before}", {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}) == "spawn"
    assert answer(f"{COMMAND}; {before}") == "spawn"


FORK_AND_SIGNAL = """
import asyncio, os, signal

async def main():
    loop, told = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGTERM, lambda: told.append("parent"))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    ended = await asyncio.to_thread(os.waitpid, child, 0)
    await asyncio.sleep(0.1)
    print("child", os.waitstatus_to_exitcode(ended[1]), told)

asyncio.run(main())
"""


def test_a_signal_to_a_fork_is_not_its_parents() -> None:
    """An event loop's, which sees signals through a socket that forks have too."""
    assert answer(f"{COMMAND}\n{ASK}{FORK_AND_SIGNAL}").splitlines()[1] == "child 7 []"
