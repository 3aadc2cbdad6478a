"""What is refused of mindformers' models without mindformers, and without MindSpore."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ms_models import suites
from vllm_ms_models.suites import mindformers
from vllm_ms_models.suites.mindformers import checks


def config(**entries: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"hidden_act": "silu", "rms_norm_eps": 1e-6, "q_lora_rank": 24} | entries))


def rope(**entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0} | entries}


PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "layers with a sliding window": ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}),
    "hidden_act 'gelu'": ("Qwen2ForCausalLM", {"hidden_act": "gelu"}),
    "rope type 'llama3' is not served from mindformers (default or yarn is)": (
        "Qwen3ForCausalLM",
        rope(rope_type="llama3"),
    ),
    "rope entries that mindformers does not read (attention_factor)": (
        "Qwen3ForCausalLM",
        rope(attention_factor=1.5),
    ),
    "rope type 'yarn' without a factor": ("Qwen3ForCausalLM", rope(factor=None)),
    "mscale other than mscale_all_dim": ("DeepseekV3ForCausalLM", rope(mscale=1.0, mscale_all_dim=0.5)),
    "layers that have no experts": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    "without q_lora_rank": ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    "rope_interleave false": ("DeepseekV3ForCausalLM", {"rope_interleave": False}),
    "rms_norm_eps 1e-05": ("DeepseekV3ForCausalLM", {"rms_norm_eps": 1e-5}),
}


@pytest.mark.parametrize("sentence", PROBLEMS)
def test_problems_of_a_configuration(sentence: str) -> None:
    architecture, entries = PROBLEMS[sentence]
    (found,) = checks.problems(architecture, config(**entries), "float32", "cpu")
    assert sentence in found
    assert found.endswith("leave out model_source.")


def test_dtypes() -> None:
    (found,) = checks.problems("Qwen3ForCausalLM", config(), "bfloat16", "cpu")
    assert "no bfloat16 on a CPU; add --dtype float32" in found
    assert not [*checks.problems("Qwen3ForCausalLM", config(**rope()), "float16", "cpu")]
    assert not [*checks.problems("Qwen3ForCausalLM", config(), "bfloat16", "ascend")]


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (found,) = checks.problems("Qwen3ForCausalLM", config(), "float32", "cpu")
    assert found.startswith("VLLM_BATCH_INVARIANT asks mindformers for operators of Ascend; unset it")


def test_the_sentence_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, or none, or without what it imports: which works, and what pip is to be told."""
    installed = dict.fromkeys(mindformers.NEEDED, "1") | {"mindformers": "2.0.0"}
    monkeypatch.setattr(suites, "_installed", installed.get)
    needed = "works with mindformers 1.9.0, and 2.0.0 is installed; run `pip install --no-deps mindformers==1.9.0`"
    with pytest.raises(suites.SuiteError, match=needed):
        mindformers.check()
    del installed["mindformers"], installed["jieba"]
    with pytest.raises(suites.SuiteError, match=r"none is installed; run `pip .* mindformers==1\.9\.0 jieba`"):
        mindformers.check()
    installed["mindformers"] = "1.9.0"
    with pytest.raises(suites.SuiteError, match=r"needs jieba, which is not installed; run `pip .*-deps jieba`"):
        mindformers.check()
    installed["jieba"] = "1"
    mindformers.check()


def test_imports_neither_mindspore_nor_the_suite() -> None:
    program = (
        "import sys\nfrom vllm_ms_models import suites\na = suites.adapter('mindformers')\n"
        "try: a.check()\nexcept suites.SuiteError: pass\n"
        "print([name for name in ('mindspore', 'mindformers', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
