"""A server for each family of models, started once, with all switched on that the tests of this folder ask for."""

import json
from collections.abc import Iterator

import pytest

from tests.features.families import FAMILIES, QUICK, family
from tests.features.service import Service
from tests.servers import serve

OPTIONS = {
    "--served-model-name": "served",
    "--dtype": "float32",
    "--max-model-len": "512",
    "--max-num-seqs": "16",
    "--max-num-batched-tokens": "64",  # prompts are read in chunks
    "--num-gpu-blocks-override": "41",  # of 32 tokens, one of which is vLLM's own: a long batch is preempted
    "--scheduling-policy": "priority",
    "--logprobs-mode": "processed_logprobs",
    "--max-logprobs": "-1",
    "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--tool-call-parser": "hermes",
    "--reasoning-parser": "deepseek_v3",  # tells reasoning apart where a request asks for it
    "--reasoning-config": '{"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}',
}
FLAGS = (
    "--enable-auto-tool-choice",
    "--enable-prompt-tokens-details",
    "--enable-tokenizer-info-endpoint",
    "--enable-scale-out",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the fixture `service` run on every family: in `make test` on the demo, and on a dense, a mixture and a
    quantized one if they are marked as representative."""
    if "service" not in metafunc.fixturenames:
        return
    definition = metafunc.definition
    quick = QUICK if definition.get_closest_marker("representative") else QUICK[:1]
    cases = [
        pytest.param(name, marks=[pytest.mark.serving] + [pytest.mark.slow] * (name not in quick)) for name in FAMILIES
    ]
    metafunc.parametrize("service", cases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    model = family(request.param)
    traces = tmp_path_factory.mktemp("traces")
    profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False}
    options = [word for option in OPTIONS.items() for word in option]
    with serve(
        model.folder,
        *options,
        *FLAGS,
        "--profiler-config",
        json.dumps(profiler),
        env={"VLLM_SERVER_DEV_MODE": "1"},  # for /reset_prefix_cache
    ) as server:
        yield Service(server, model, traces)
