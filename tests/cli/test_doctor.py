"""`vllm-ms doctor` says of a model what vLLM's engine then does: it loads with that much room, or ends so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import checkpoint
from tests.cli.test_doctor_here import ROOT
from tests.engines import _DEFAULTS, engine
from tests.serving.test_errors import BROKEN, REFUSED, Damage, edit_config, model  # noqa: F401 (a fixture)
from vllm_ms_models import memory
from vllm_ms_models.cli.doctor.command import doctor
from vllm_ms_models.cli.doctor.model import Verdict, verdict

UNKNOWN: Damage = edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
NAMED = ("missing tensor", "wrong shape", "unknown architecture", "unknown quantization")
CASES = {**{name: damage for name, (damage, _) in BROKEN.items()}, "unknown quantization": UNKNOWN}
WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}


def judged(folder: Path, **options: Any) -> Verdict:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return verdict(AsyncEngineArgs(str(folder), **(_DEFAULTS | options)))


def slow_unless(quick: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if quick else (pytest.mark.slow,)


@pytest.mark.parametrize("chosen", [True, False], ids=["cache of 32 MiB", "default cache"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen2", WINDOWS, id="qwen2 with windows"),
        pytest.param("llama", {"tie_word_embeddings": True}, id="tied llama", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {}, id="deepseek_v3", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, id="qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_what_loads(family: str, options: dict[str, Any], chosen: bool) -> None:
    """The engine reports the same tokens of KV cache; a token's bytes are those of its tensors."""
    folder = checkpoint(family, **(_family_options(family) | options))
    settings: dict[str, Any] = {"dtype": "bfloat16"} | ({} if chosen else {"kv_cache_memory_bytes": None})
    found = judged(folder, **settings)
    assert found.problems == []
    assert (found.loads, found.dtype, found.quantization, found.ranks) == (True, "bfloat16", "none", 1)
    tensors = load_file(folder / "model.safetensors")
    wide = "e_score_correction_bias"  # kept in float32
    assert found.weight_bytes == [sum(t.size * (4 if name.endswith(wide) else 2) for name, t in tensors.items())]
    with engine(folder, **settings) as llm:
        config = llm.llm_engine.vllm_config
        assert found.kv_cache_tokens == config.cache_config.kv_cache_size_tokens
        assert found.max_model_len == config.model_config.max_model_len
        core: Any = llm.llm_engine.engine_core
        caches = core.engine_core.model_executor.driver_worker.worker.model_runner.kv_caches
        tokens = (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size
        if options != WINDOWS:  # with those, layers of different kinds share memory
            assert found.kv_bytes_per_token == sum(cache.nbytes for cache in caches) // tokens


def _family_options(family: str) -> dict[str, Any]:
    from tests.checkpoints import DEEPSEEK

    return DEEPSEEK if family.startswith("deepseek") else {}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=slow_unless(case in NAMED), id=case.replace(" ", "-")) for case in CASES]
)
def test_broken_checkpoints(model: Path, case: str) -> None:  # noqa: F811
    """The engine ends with the very sentence."""
    CASES[case](model)
    found = judged(model, dtype="bfloat16")
    assert not found.loads
    with pytest.raises(Exception) as raised, engine(model, dtype="bfloat16"):
        pass
    assert found.problems[0] in str(raised.value)


WORKERS_OWN = ("--profiler-config",)  # vLLM asks for it when a worker has started


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in REFUSED if case not in WORKERS_OWN])
def test_refused_options(case: str) -> None:
    options, _ = REFUSED[case]
    options = options | {"dtype": options.get("dtype", "float32")}
    found = judged(checkpoint("llama"), **options).problems[0]
    with pytest.raises(Exception) as raised, engine(checkpoint("llama"), **options):
        pass
    if case == "--dtype":  # pydantic's own; it writes name and sentence on two lines
        found = found.partition(": ")[2]
    free = re.compile(r"[\d.]+ GiB of this host's")  # changes from one second to the next
    assert free.sub("", found) in free.sub("", str(raised.value))


def test_every_refusal_is_said() -> None:
    found = judged(checkpoint("llama"), block_size=8, load_format="pt", cpu_offload_gb=1.0)
    assert [sentence.split()[0] for sentence in found.problems] == ["--block-size", "--load-format", "--cpu-offload-gb"]


@pytest.mark.parametrize("available", [memory.GIB, memory.GIB + (1 << 20)], ids=["weights", "cache"])
def test_too_little_memory(available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 3.4 MB; or one that fits, but whose cache for the longest sequence (0.5 MiB) does not."""
    from vllm_ms_models import worker
    from vllm_ms_models.bridge import loader
    from vllm_ms_models.cli.doctor import model as doctor_model

    folder = checkpoint("llama", max_position_embeddings=4096)
    weights = judged(folder, load_format="dummy").weight_bytes[0]
    if available > memory.GIB:
        available = memory.GIB + weights
    for module in (loader, worker, doctor_model):
        monkeypatch.setattr(module, "host_memory", lambda: memory.HostMemory(8 * memory.GIB, available))
    monkeypatch.setattr(worker, "host_memory", lambda: memory.HostMemory(8 * memory.GIB, available - weights))
    settings: dict[str, Any] = {"kv_cache_memory_bytes": None, "max_model_len": 4096}
    found = judged(folder, **settings)
    with pytest.raises(ValueError) as raised, engine(folder, **settings):
        pass
    assert found.problems == [str(raised.value)]


@pytest.mark.slow
def test_a_model_that_is_larger_than_this_machine(tmp_path: Path) -> None:
    """Files without data; nothing of the model is held meanwhile."""
    from transformers import LlamaConfig

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    inner, hidden, vocabulary = 53248, 16384, 1024
    layer = {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = total // (2 * 3 * inner * hidden) + 1
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + end)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=128,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    code = (
        "import resource, sys\nfrom vllm_ms_models.cli import main\ncode = main(sys.argv[1:])\n"
        "print('end', code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    words = [sys.executable, "-c", code, "doctor", str(tmp_path), "--skip-tokenizer-init"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f"The model's weights need {memory.gib(end)} and 1.00 GiB for working space" in run.stdout, run.stderr
    _, code_, peak = run.stdout.splitlines()[-1].split()
    assert code_ == "1"
    assert int(peak) < 4 * memory.GIB  # torch, vLLM, MindSpore: 1 GiB


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks(ranks: int) -> None:
    """Each rank's part: what is split is split, norms are not; the vocabulary (211) is cut unevenly."""
    folder = checkpoint("llama", num_key_value_heads=4)
    found = judged(folder, tensor_parallel_size=ranks)
    assert found.problems == []
    tensors = load_file(folder / "model.safetensors")
    split = sum(tensor.nbytes for name, tensor in tensors.items() if tensor.ndim == 2 and "layers" in name)
    norms = sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim == 1)
    rows = [len(part) for part in np.split(np.arange(211), [-(-211 // ranks) * i for i in range(1, ranks)])]
    assert found.weight_bytes == [split // ranks + norms + 2 * count * 64 * 4 for count in rows]
    alone = judged(folder)
    assert alone.kv_bytes_per_token == ranks * (found.kv_bytes_per_token or 0)


@pytest.mark.slow
def test_stages_of_a_pipeline() -> None:
    folder = checkpoint("llama")
    found = judged(folder, pipeline_parallel_size=3)
    assert found.problems == []
    tensors = load_file(folder / "model.safetensors")
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.0."))
    table = tensors["lm_head.weight"].nbytes
    assert found.weight_bytes == [layer + table, layer, layer + table + tensors["model.norm.weight"].nbytes]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a16"])
def test_quantized(scheme: str, tmp_path: Path) -> None:
    """The format, and the linears of each scheme; it loads."""
    from tests.cli.quantizing import SIZES, quantize

    folder = quantize(checkpoint("qwen2", **SIZES), tmp_path / "out", "--scheme", scheme, calibrated=False)
    found = judged(folder)
    assert found.problems == []
    assert found.quantization == "compressed-tensors"
    kind = "Int8Weight" if scheme == "w8a8-dynamic" else "PackedWeight"
    counts = {name.split("(")[0]: count for name, count in found.schemes.items()}
    assert counts == {kind: 7 * SIZES["num_hidden_layers"], "FloatWeight": 1}
    with engine(folder) as llm:
        assert llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens == found.kv_cache_tokens


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code and JSON, for options of vllm serve."""
    folder = str(checkpoint("llama"))
    options = ["--skip-tokenizer-init", "--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "float32"]
    assert doctor(folder, options, as_json=True) == 0
    text = capsys.readouterr().out
    content = json.loads(text[text.index("{\n") :])
    assert content["problems"] == []
    assert content["model"]["loads"] is True
    assert content["model"]["kv_bytes_per_token"] == 3 * 2 * 16 * 2 * 4  # layers, heads, head size, k and v, float32
    assert content["model"]["kv_cache_tokens"] == 8 * 256 + 32  # and the block that vLLM keeps for itself
    assert doctor(folder, [*options, "--block-size", "8"], as_json=False) == 1
    assert "refused: --block-size 8 is not supported" in capsys.readouterr().out
