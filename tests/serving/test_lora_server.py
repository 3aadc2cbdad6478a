"""`vllm serve --enable-lora`: adapters of the start and loaded at run time, over HTTP and by the openai client."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import peft
import pytest
import torch

from tests.reference import torch_reference
from tests.servers import DEMO, Server, serve

pytestmark = pytest.mark.serving

TOKENS = 6
PROMPTS = [[5, 9, 33, 21, 8], [40, 41, 42], [7] * 12]


def write(folder: Path, seed: int, rank: int) -> Path:
    """An adapter of the demo's model."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
    model = peft.get_peft_model(torch_reference.load(DEMO), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    model.save_pretrained(str(folder))
    return folder


def expected(adapter: Path | None) -> list[list[int]]:
    model = torch_reference.load(DEMO)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).get_base_model().eval()
    answers = [torch_reference.greedy(model, prompt, TOKENS) for prompt in PROMPTS]
    assert all(answer.margin > torch_reference.LEAST_MARGIN for answer in answers), "a tie: choose another seed"
    return [answer.tokens for answer in answers]


def answers(server: Server, model: str) -> list[list[int]]:
    """All prompts in one request, so that they are in one batch."""
    found = server.client.completions.create(
        model=model, prompt=PROMPTS, max_tokens=TOKENS, temperature=0, extra_body={"return_token_ids": True}
    )
    return [choice.token_ids for choice in sorted(found.choices, key=lambda choice: choice.index)]


def post(server: Server, path: str, **content: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=content, timeout=60)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write(root / str(number), number, rank) for number, rank in enumerate((4, 8, 3))]


@pytest.fixture(scope="module")
def server(folders: list[Path]) -> Iterator[Server]:
    options = ["--served-model-name", "demo", "--dtype", "float32", "--enable-lora", "--max-loras", "2"]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(DEMO, *options, "--lora-modules", f"first={folders[0]}", env=env) as server:
        yield server


def test_adapter_of_the_start(server: Server, folders: list[Path]) -> None:
    assert [model.id for model in server.client.models.list()] == ["demo", "first"]
    assert answers(server, "demo") == expected(None)
    assert answers(server, "first") == expected(folders[0])


@pytest.mark.feature("LoRA", families=["qwen2"])
def test_loaded_and_unloaded_at_run_time(server: Server, folders: list[Path]) -> None:
    """More than fit at once: three adapters where two are kept."""
    for name, folder in (("second", folders[1]), ("third", folders[2])):
        response = post(server, "load_lora_adapter", lora_name=name, lora_path=str(folder))
        assert response.status_code == 200, response.text
    assert len({str(expected(folder)) for folder in (None, *folders)}) == 4
    for _ in range(2):
        for name, folder in zip(("first", "second", "third"), folders, strict=True):
            assert answers(server, name) == expected(folder)
    assert post(server, "unload_lora_adapter", lora_name="second").status_code == 200
    with pytest.raises(openai.NotFoundError):
        answers(server, "second")
    assert answers(server, "third") == expected(folders[2])
    assert answers(server, "demo") == expected(None)


def test_bad_adapter_at_run_time(server: Server, folders: list[Path], tmp_path: Path) -> None:
    response = post(server, "load_lora_adapter", lora_name="absent", lora_path="/nowhere/at/all")
    assert response.status_code == 404
    assert "No adapter found for /nowhere/at/all" in response.text
    broken = shutil.copytree(folders[0], tmp_path / "broken")
    (broken / "adapter_model.safetensors").unlink()
    response = post(server, "load_lora_adapter", lora_name="broken", lora_path=str(broken))
    assert response.status_code >= 400
    assert "has no adapter_model.safetensors; save it with PEFT" in response.text
    with pytest.raises(openai.NotFoundError):
        answers(server, "broken")
    assert answers(server, "first") == expected(folders[0])
