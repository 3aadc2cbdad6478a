"""What cannot be served ends in one sentence that names the thing and the remedy, and in nothing that serves."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoints import checkpoint
from tests.engines import engine
from tests.servers import VLLM

Damage = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound tiny Llama of two shards, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama", max_shard_size="200KB"), folder)
    assert len(shards(folder)) > 1
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_config(**values: Any) -> Damage:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    """Change the tensors of the first shard, and the index with them."""

    def edit(folder: Path) -> None:
        shard, index = shards(folder)[0], folder / "model.safetensors.index.json"
        tensors = load_file(shard)
        before = set(tensors)
        change(tensors)
        save_file(tensors, shard)
        content = json.loads(index.read_text())
        for name in before - set(tensors):
            del content["weight_map"][name]
        content["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index.write_text(json.dumps(content))

    return edit


def truncate(folder: Path) -> None:
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 100)


def corrupt(folder: Path) -> None:
    with shards(folder)[0].open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 40)


def pickle_only(folder: Path) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")


EMBEDDING = "model.embed_tokens.weight"

BROKEN: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda folder: shards(folder)[1].unlink(), r"model-00002-of-.*safetensors"),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(EMBEDDING)), EMBEDDING),
    "unexpected tensor": (
        edit_tensors(lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)})),
        r"model\.extra\.weight",
    ),
    "wrong shape": (
        edit_tensors(lambda tensors: tensors.update({EMBEDDING: np.zeros((211, 63), np.float32)})),
        rf"{EMBEDDING}.*\(?211, 63",
    ),
    "wrong dtype": (
        edit_tensors(lambda tensors: tensors.update({EMBEDDING: np.zeros((211, 64), np.int32)})),
        rf"{EMBEDDING}.*I32",
    ),
    "truncated": (truncate, r"model-00002-of-.*safetensors"),
    "corrupt": (corrupt, r"model-00001-of-.*safetensors"),
    "pickle": (pickle_only, r"safetensors"),
    "architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]),
        r"GPT2LMHeadModel.* not supported.*\[.*'LlamaForCausalLM', .*'MistralForCausalLM', .*'Qwen2ForCausalLM', .*\]",
    ),
    "unknown architecture": (
        edit_config(architectures=["NobodyForCausalLM"]),
        r"NobodyForCausalLM.* not supported.*\[.*'LlamaForCausalLM', .*'Qwen2ForCausalLM', .*\]",
    ),
    "activation": (edit_config(hidden_act="relu"), r"Activation 'relu'.*supported are silu"),
    "floats described as quantized": (
        edit_config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        r"wanted tensors are missing: '[^']*weight_scale'.*has dtype F32 where F8_E4M3 is expected",
    ),
    "quantization that is not known": (
        edit_config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "novelty": 1}),
        r"settings that are not known here: 'novelty'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(model: Path, case: str) -> None:
    damage, sentence = BROKEN[case]
    damage(model)
    with pytest.raises(Exception, match=re.compile(sentence, re.S)), engine(model, dtype="bfloat16"):
        pass


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "--tensor-parallel-size": (
        {"tensor_parallel_size": 2, "distributed_executor_backend": "uni"},
        r"--distributed-executor-backend uni has one process, which cannot be 2 ranks; use mp, or leave it out",
    ),
    "--tensor-parallel-size and heads": (
        {"tensor_parallel_size": 3},
        r"attention heads \(4\) must be divisible by tensor parallel",
    ),
    "--pipeline-parallel-size": (
        {"pipeline_parallel_size": 4},
        r"--pipeline-parallel-size 4 is more than the model's 3 layers; use 3 at most",
    ),
    "--enable-sleep-mode": ({"enable_sleep_mode": True}, r"Sleep mode is not supported on current platform\."),
    "--enable-eplb": (
        {"enable_eplb": True},
        r"Expert parallelism load balancing is only supported on CUDA devices or ROCm devices or XPU devices now\.",
    ),
    "--kv-transfer-config": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        r"--kv-transfer-config is not supported yet; leave it out\.",
    ),
    "--kv-offloading-size": ({"kv_offloading_size": 1.0}, r"--kv-offloading-size is not supported yet; leave it out\."),
    "--cpu-offload-gb": ({"cpu_offload_gb": 1.0}, r"--cpu-offload-gb is not supported yet; leave it out\."),
    "--enable-prompt-embeds": (
        {"enable_prompt_embeds": True},
        r"--enable-prompt-embeds is not supported yet; leave it out\.",
    ),
    "--attention-backend": (
        {"attention_backend": "FLASH_ATTN"},
        r"--attention-backend is not supported yet; leave it out\.",
    ),
    "--decode-context-parallel-size": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        r"--decode-context-parallel-size 2 is not supported yet; use 1\.",
    ),
    "--profiler-config": (
        {"profiler_config": {"profiler": "cuda"}},
        r"Unsupported profiler type for cpu: cuda\. Supported profiler types: torch\.",
    ),
    "--quantization": (
        {"quantization": "fp8", "dtype": "bfloat16"},
        r"--quantization fp8 is not possible: the checkpoint is not quantized, and weights are not quantized while "
        r"they are loaded; leave it out, or serve a quantized checkpoint\.",
    ),
    "--model-loader-extra-config": (
        {"model_loader_extra_config": {"enable_multithread_load": True}},
        r"--model-loader-extra-config is not supported yet",
    ),
    "--distributed-executor-backend": (
        {"distributed_executor_backend": "external_launcher"},
        r"--distributed-executor-backend external_launcher is not supported yet",
    ),
    "--load-format": ({"load_format": "pt"}, r"--load-format pt is not supported.*safetensors"),
    "--block-size": ({"block_size": 8}, r"--block-size 8 is not supported: use a multiple of 16"),
    "--kv-cache-dtype": ({"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 is not supported"),
    "--model-impl": (
        {"model_impl": "transformers"},
        r"--model-impl transformers runs a torch model; leave it at auto to use MindSpore's\.",
    ),
    "--max-model-len": ({"max_model_len": 4096}, r"4096.*512"),
    "--dtype": (
        {"dtype": "float64"},
        r"should be 'auto', 'half', 'float16', 'bfloat16'.*float64",
    ),
    "cache too large": (
        {"kv_cache_memory_bytes": 2**50},
        r"--kv-cache-memory-bytes .*asks for 1048576.00 GiB, but only",
    ),
}


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
SPECULATION: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        NGRAM | {"method": "ngram_gpu"},
        r"--speculative-config with the method ngram_gpu is not supported; use one of ngram, draft_model, mtp\.",
    ),
    "no layer": ({"method": "mtp", "num_speculative_tokens": 1}, r"Unsupported speculative method: 'mtp'"),
    "sampler": (NGRAM | {"rejection_sample_method": "block"}, r"rejection_sample_method='block'.*'standard' is"),
    "option": (NGRAM | {"kv_cache_dtype": "bfloat16"}, r"kv_cache_dtype in --speculative-config.*leave it out"),
    "schedule": (
        NGRAM | {"num_speculative_tokens_per_batch_size": [(1, 8, 2)]},
        r"num_speculative_tokens_per_batch_size in --speculative-config is not supported yet",
    ),
    "layer of another model": (
        {"model": "deepseek_v3", "num_speculative_tokens": 1},
        r"takes .*'s layer that predicts further tokens.*leave `model` out",
    ),
    "vocabulary": ({"model": "qwen2", "num_speculative_tokens": 1}, r"same vocabulary size"),
}


OTHER_METHODS = pytest.mark.feature("other speculation methods", refused=SPECULATION["method"][1].replace("\\", ""))
NO_LAYER = pytest.mark.feature(
    "speculation by MTP layers",
    families=["qwen2", "llama", "qwen3", "qwen3_moe", "mixtral"],
    refused=SPECULATION["no layer"][1],
)
SPECULATION_MARKS = {"method": OTHER_METHODS, "no layer": NO_LAYER}


@pytest.mark.parametrize("case", [pytest.param(case, marks=SPECULATION_MARKS.get(case, ())) for case in SPECULATION])
def test_refused_speculation(case: str) -> None:
    speculation, sentence = SPECULATION[case]
    if "model" in speculation:
        sizes: dict[str, Any] = {"vocab_size": 97} if case == "vocabulary" else {"num_nextn_predict_layers": 1}
        speculation = speculation | {"model": str(checkpoint(speculation["model"], **sizes))}
    folder = checkpoint("llama")
    with pytest.raises(Exception, match=re.compile(sentence, re.S)), engine(folder, speculative_config=speculation):
        pass


@pytest.mark.parametrize("partition", ["3,0", "2,2", "1,1,1", "most,few"])
def test_refused_partition(partition: str) -> None:
    sentence = rf"VLLM_PP_LAYER_PARTITION={partition} does not give each of 2 stages a number of layers above 0, 3 in"
    env = {"VLLM_PP_LAYER_PARTITION": partition}
    with pytest.raises(ValueError, match=sentence), engine(checkpoint("llama"), env, pipeline_parallel_size=2):
        pass


def test_refused_speculation_in_a_pipeline() -> None:
    sentence = "--speculative-config is not supported with --pipeline-parallel-size 2; leave out one of them"
    options: dict[str, Any] = {"pipeline_parallel_size": 2, "speculative_config": NGRAM}
    with pytest.raises(ValueError, match=sentence), engine(checkpoint("llama"), **options):
        pass


FEATURES = {  # as docs/features.md calls them
    "--enable-sleep-mode": "sleep mode",
    "--kv-transfer-config": "KV transfer",
    "--kv-offloading-size": "KV offloading",
    "--cpu-offload-gb": "weight offloading",
    "--enable-prompt-embeds": "prompt embeddings",
    "--attention-backend": "other attention backends",
    "--enable-eplb": "expert load balancing",
    "--decode-context-parallel-size": "context parallelism",
    "--model-impl": "transformers as model implementation",
    "--quantization": "quantizing while loading",
    "--profiler-config": "other profilers",
}


def with_feature(case: str) -> Any:
    sentence = REFUSED[case][1].replace("\\", "")
    return pytest.param(case, marks=pytest.mark.feature(FEATURES[case], refused=sentence) if case in FEATURES else ())


@pytest.mark.parametrize("case", [with_feature(case) for case in REFUSED])
def test_refused_option(case: str) -> None:
    options, sentence = REFUSED[case]
    with pytest.raises(Exception, match=re.compile(sentence, re.S)), engine(checkpoint("llama"), **options):
        pass


def test_rope_type_is_refused(model: Path) -> None:
    edit_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0})(model)
    with pytest.raises(Exception, match=r"spiral.*supported are default, linear|Unrecognized.*spiral"), engine(model):
        pass


def test_plugins_that_leave_out_the_models_are_refused() -> None:
    sentence = "VLLM_PLUGINS=mindspore leaves out mindspore_models"
    with pytest.raises(ValueError, match=sentence), engine(checkpoint("llama"), env={"VLLM_PLUGINS": "mindspore"}):
        pass


def test_cache_space_that_is_no_number_is_refused() -> None:
    env = {"VLLM_CPU_KVCACHE_SPACE": "much"}
    sentence = "VLLM_CPU_KVCACHE_SPACE=much is not a number of GiB above 0"
    with pytest.raises(ValueError, match=sentence), engine(checkpoint("llama"), env=env, kv_cache_memory_bytes=None):
        pass


def test_length_beyond_the_rope_is_refused_even_when_vllm_is_told_to_allow_it() -> None:
    allow = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    sentence = r"--max-model-len 4096 is beyond the 512 positions.*use 512 or less"
    with pytest.raises(ValueError, match=sentence), engine(checkpoint("llama"), env=allow, max_model_len=4096):
        pass


def test_weights_that_do_not_fit_are_refused_before_they_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ms_models import memory
    from vllm_ms_models.bridge import loader

    monkeypatch.setattr(loader, "host_memory", lambda: memory.HostMemory(8 * memory.GIB, memory.GIB))
    with pytest.raises(ValueError, match=r"weights need 0\.00 GiB.*1\.00 GiB of this host's 8\.00 GiB"), engine(model):
        pass


def test_cache_that_cannot_hold_one_sequence_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ms_models import memory, worker

    monkeypatch.setattr(worker, "host_memory", lambda: memory.HostMemory(8 * memory.GIB, memory.GIB + 10))
    sentence = r"KV cache of one sequence.*needs 0\.00 GiB.*lower --max-model-len"
    with pytest.raises(ValueError, match=sentence), engine(model, kv_cache_memory_bytes=None):
        pass


@pytest.mark.serving
@pytest.mark.parametrize(
    ("damage", "env", "sentence"),
    [
        (edit_tensors(lambda tensors: tensors.pop(EMBEDDING)), {}, EMBEDDING),
        (lambda _: None, {"VLLM_TARGET_DEVICE": "cpu"}, "VLLM_TARGET_DEVICE=cpu makes it ignore plugins, unset it"),
        (lambda _: None, {"VLLM_MS_DEVICE": "ascend"}, "this host has no Ascend device; set VLLM_MS_DEVICE=cpu"),
    ],
)
def test_server_ends_with_the_sentence_and_a_status(
    model: Path, damage: Damage, env: dict[str, str], sentence: str
) -> None:
    damage(model)
    done = subprocess.run(
        [VLLM, "serve", str(model), "--port", "0", "--skip-tokenizer-init"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, r"MindSpore is not installed.*pip install mindspore==2\.10\.0"),
        ("2.9.0", r"MindSpore 2\.9\.0 is installed"),
    ],
)
def test_mindspore_missing_or_of_another_version(
    found: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import PackageNotFoundError

    from vllm_ms_models import runtime

    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(runtime, "version", version)
    with pytest.raises(Exception, match=sentence), engine(checkpoint("llama")):
        pass
