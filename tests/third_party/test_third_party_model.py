"""An architecture from another package: built, installed beside ours, and served by `vllm serve`.

The package is the folder `toy_package`, which knows this one by its layers and one entry point only.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.checkpoints import random_model, random_prompts
from tests.pooling.models import check, hidden, normalized, with_tokenizer
from tests.servers import VLLM, serve

PACKAGE = Path(__file__).with_name("toy_package")
SCALE = 0.25
TOKENS = 24


def pip(*arguments: str | Path) -> None:
    """pip of this environment, without network or isolation."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy package installed from its wheel."""
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-index")
    pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "wheels", source)
    pip("install", *offline, "--target", folder / "site", *(folder / "wheels").glob("toy_models-*.whl"))
    assert (folder / "site" / "toy_models" / "model.py").exists()
    return folder / "site"


def torch_model(scale: float) -> Any:
    """Qwen2 in torch, its embeddings multiplied by `scale`."""
    model = random_model("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are not scaled, and a config that says that the model does it."""
    folder = tmp_path_factory.mktemp("toy_checkpoint")
    torch_model(1.0).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ToyForCausalLM"], "embedding_scale": SCALE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Continuation of `prompt`; no choice may be close, as float32 sums in another order differ by 1e-5."""
    ids = list(prompt)
    for _ in range(TOKENS):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "choose another seed"
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


@pytest.mark.serving
def test_a_package_with_its_own_architecture_is_served(site: Path, checkpoint: Path) -> None:
    prompts = random_prompts([3, 17])
    want = [greedy(torch_model(SCALE), prompt) for prompt in prompts]
    assert want != [greedy(torch_model(1.0), prompt) for prompt in prompts], "the scale must matter"
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    options = ("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--skip-tokenizer-init")
    with serve(checkpoint, *options, "--served-model-name", "toy", env={"PYTHONPATH": path}) as server:
        request = {"model": "toy", "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60)
        assert answer.status_code == 200, answer.text
        assert [choice["token_ids"] for choice in answer.json()["choices"]] == want
    assert server.process.returncode is not None


@pytest.mark.slow
@pytest.mark.serving
def test_it_embeds(site: Path, checkpoint: Path) -> None:
    """It knows nothing of that, and builds a head that is not asked for anything."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    options = ("--dtype", "float32", "--max-model-len", "64", "--runner", "pooling", "--served-model-name", "toy")
    prompts = random_prompts([3, 17])
    with serve(with_tokenizer(checkpoint), *options, env={"PYTHONPATH": path}) as server:
        answer = server.client.embeddings.create(model="toy", input=prompts, encoding_format="float")
        for item, prompt in zip(answer.data, prompts, strict=True):
            check(item.embedding, normalized(hidden(torch_model(SCALE).model, prompt)[-1]))


@pytest.mark.slow
def test_it_is_refused_in_a_pipeline(site: Path, checkpoint: Path) -> None:
    """It builds all layers whatever its stage."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    options = ("--dtype", "float32", "--max-model-len", "64", "--skip-tokenizer-init", "--pipeline-parallel-size", "2")
    done = subprocess.run(
        [VLLM, "serve", str(checkpoint), "--port", "0", *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    sentence = "ToyForCausalLM cannot be split over the stages of a pipeline; leave out --pipeline-parallel-size"
    assert sentence in done.stdout + done.stderr
