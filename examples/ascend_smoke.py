"""What examples/ascend_smoke.sh does in Python: `python examples/ascend_smoke.py device|checkpoint|requests|...`."""

import ipaddress
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent / "demo" / "checkpoint"
VOCABULARY = 1024  # of the demo's tokenizer, which the tiny checkpoint gets as well
LENGTHS = (1, 7, 130, 300)  # of the prompts: one token, short, across a block of 128, in two parts beside others
TOKENS = 16  # generated for each
# How far log-probabilities may be apart. In bfloat16, those of this package's other kernels on a CPU are 0.03 from each
# other's for the tiny checkpoint, 0.04 on two ranks, and 0.1 in W8A8, where an activation may be rounded otherwise.
ALLOWED = 0.25
IN_GRAPHS = ("all_reduce", "all_gather", "all_gather_rows", "reduce_scatter")  # collectives


def device() -> int:
    """One product on the first device, and what MindSpore says about the device."""
    import mindspore as ms
    import numpy as np

    ms.set_device("Ascend")
    print("MindSpore", ms.__version__, "device:", ms.hal.get_device_properties(0, "Ascend"))
    ms.run_check()
    x = ms.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
    product = ms.mint.matmul(x, x.T).asnumpy()
    print("product:", product.tolist())
    return 0 if np.array_equal(product, [[5, 14], [14, 50]]) else 1


def collectives() -> int:
    """Every collective of the layers between the first two devices, by HCCL, each in a process of its own."""
    meeting = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, __file__, "rank"]
    ranks = [subprocess.Popen([*command, str(number), meeting]) for number in range(2)]
    # One that fails leaves the other waiting. (The script's time-out ends all of this group of processes.)
    while None in [process.poll() for process in ranks] and not any(process.returncode for process in ranks):
        time.sleep(0.2)
    for process in ranks:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return int(any(process.returncode for process in ranks))


def rank(number: str, meeting: str) -> int:
    import mindspore as ms
    from mindspore.mint import distributed

    from vllm_ms_models.distributed.communication import DeviceGroup, GraphGroup

    ms.set_device("Ascend", int(number))
    distributed.init_process_group("hccl", init_method=meeting, world_size=2, rank=int(number))
    name = distributed.new_group([0, 1])
    wrong = compared(DeviceGroup(int(number), 2))
    wrong |= compared(GraphGroup(int(number), 2, name), "operators of graphs, ")
    return wrong | compared(GraphGroup(int(number), 2, name), "in graphs, ", compiled=True)


def compared(group: Any, how: str = "", compiled: bool = False) -> int:
    """Of this rank of two: is what each collective gives what all that was given makes of it? 1 if one is not.

    `compiled` are those that layers have in graphs.
    """
    import mindspore as ms
    import numpy as np

    given = [np.arange(12, dtype=np.float32).reshape(4, 3) + 10 * number for number in range(2)]
    mine = slice(2 * group.rank, 2 * group.rank + 2)
    wanted = {
        "all_reduce": given[0] + given[1],
        "all_gather": np.concatenate(given, -1),
        "all_gather_rows": np.concatenate(given),
        "reduce_scatter": (given[0] + given[1])[mine],
        "all_to_all": np.concatenate([x[mine] for x in given]),
        "broadcast": given[0],
    }
    wanted = {name: want for name, want in wanted.items() if not compiled or name in IN_GRAPHS}
    wrong = 0
    for dtype in (ms.float32, ms.bfloat16):  # which holds these numbers, too
        for name, want in wanted.items():
            try:
                call = in_graph(getattr(group, name)) if compiled else getattr(group, name)
                result = call(ms.Tensor(given[group.rank]).astype(dtype))
                right = np.array_equal(result.astype(ms.float32).asnumpy(), want)
                said = "ok" if right else f"differs: {result.astype(ms.float32).asnumpy().tolist()}"
            except (RuntimeError, TypeError, ValueError) as error:
                right, said = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            wrong |= not right
            print(f"rank {group.rank}: {how}{name}, {str(dtype).lower()}: {said}", flush=True)
    return wrong


def in_graph(call: Any) -> Any:
    import mindspore as ms

    class Graph(ms.nn.Cell):
        @ms.jit
        def construct(self, x: Any) -> Any:
            return call(x)

    return Graph()


def checkpoint(folder: str) -> int:
    """A Llama of random weights, by transformers: two layers, four heads of 64, two of them with keys and values.

    Weights are large and norms are not one, so that probabilities are well apart and attention is far from uniform.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + noise * 0.2 if weight.ndim == 1 else noise * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    print("written:", sum(weight.numel() for weight in model.parameters()), "parameters")
    return 0


def requests(folder: str, model: str) -> int:
    """Bodies of requests: greedy completions of prompts of random tokens, and the one that is timed."""
    config = Path(model, "config.json")  # absent: the tiny checkpoint, not written yet
    vocabulary = json.loads(config.read_text()).get("vocab_size", VOCABULARY) if config.exists() else VOCABULARY
    chosen = random.Random(0)
    common = {"model": "smoke", "temperature": 0, "ignore_eos": True}
    asked = {"logprobs": 5, "return_token_ids": True, "return_tokens_as_token_ids": True}
    for length in LENGTHS:
        prompt = [chosen.randrange(vocabulary) for _ in range(length)]
        body = common | asked | {"prompt": prompt, "max_tokens": TOKENS}
        Path(folder, f"prompt_{length}.json").write_text(json.dumps(body))
    timed = common | {"prompt": [chosen.randrange(vocabulary) for _ in range(32)], "max_tokens": 64}
    Path(folder, "timing.json").write_text(json.dumps(timed))
    return 0


def compare(folder: str, other: str) -> int:
    """Are the tokens of all answers in two folders the same, or different only where bfloat16 cannot tell?"""
    names = sorted(path.name for path in Path(other).glob("prompt_*.json"))
    same, tokens, furthest, faults = 0, 0, 0.0, []
    for name in names:
        mine, theirs = (json.loads(Path(x, name).read_text())["choices"][0] for x in (folder, other))
        equal, apart, gap = agreement(mine, theirs)
        same, tokens, furthest = same + equal, tokens + len(theirs["token_ids"]), max(furthest, apart)
        if apart > ALLOWED:
            faults.append(f"{name}: log-probabilities of the same tokens {apart:.2g} apart, {ALLOWED:g} allowed")
        if gap > 2 * ALLOWED:
            faults.append(
                f"{name}: token {equal + 1} is another, and the first one's log-probability is {gap:.2g} lower"
            )
    print(
        f"{same} of {tokens} tokens are the same before the first that differs; log-probabilities {furthest:.2g} apart"
    )
    print(*faults, sep="\n", end="\n" if faults else "")
    return 0 if names and not faults else 1


def agreement(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[int, float, float]:
    """Of two choices: tokens up to the first difference, how far their log-probabilities are apart, and the gap there.

    The gap is how much less probable `mine` found the token of `theirs` than its own; infinite if not among its five.
    """
    pairs = list(zip(mine["token_ids"], theirs["token_ids"], strict=True))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    values = [choice["logprobs"]["token_logprobs"][:equal] for choice in (mine, theirs)]
    apart = max((abs(a - b) for a, b in zip(*values, strict=True)), default=0.0)
    if equal == len(pairs):
        return equal, apart, 0.0
    top = mine["logprobs"]["top_logprobs"][equal]
    found = top.get(f"token_id:{pairs[equal][1]}")
    return equal, apart, float("inf") if found is None else mine["logprobs"]["token_logprobs"][equal] - found


def hide() -> int:
    """Standard input with what says whose machine this is, or opens it, replaced."""
    for line in sys.stdin:
        sys.stdout.write(hidden(line))
    return 0


def hidden(line: str) -> str:
    host = socket.gethostname()
    names = {host, host.split(".")[0], os.environ.get("USER", "")}
    home = os.path.expanduser("~")
    if home not in ("/", "/root"):
        line = line.replace(home, "~")
    for name in sorted(names - {"", "localhost", "root"}, key=len, reverse=True):
        line = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<name>", line)
    line = re.sub(r"\b(hf|sk|ghp|gho|glpat)[_-][A-Za-z0-9_-]{8,}", "<secret>", line)
    line = re.sub(
        r"(?i)((?:api[_-]?key|token|secret\w*|password\w*)[\"']?\s*[=:]\s*[\"']?)[^\s\"',]{6,}", r"\1<secret>", line
    )
    line = re.sub(r"(?i)\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", "<address>", line)
    # Not after == or -, where numbers with dots are versions.
    return re.sub(r"(?i)(?<![\w.:-])(?<!==)(?:[0-9a-f]*:[0-9a-f:]+|\d+(?:\.\d+){3})(?![\w.])", _address, line)


def _address(found: re.Match[str]) -> str:
    """Those that every machine has say nothing; and a time of day is no address."""
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]
    return found[0] if address.is_loopback or address.is_unspecified else "<address>"


def port() -> int:
    print(free_port())
    return 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


COMMANDS = {f.__name__: f for f in (device, collectives, rank, checkpoint, requests, compare, hide, port)}

if __name__ == "__main__":
    raise SystemExit(COMMANDS[sys.argv[1]](*sys.argv[2:]))
