"""`vllm-ms verify`: sound models agree with transformers, and a fault is found in the layer that has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import checkpoint
from tests.zoo.family import families
from vllm_ms_models import registry
from vllm_ms_models.cli import main
from vllm_ms_models.cli.verify.comparison import TOLERANCE, compare
from vllm_ms_models.cli.verify.runs import Run
from vllm_ms_models.qwen2 import model as qwen2

FEW = ("--max-tokens", "6", "--tokens", "5,17,120,3,99,42,7", "--tokens", "8")
SOUND = [
    name
    for name, family in families().items()
    if family.publish is None and set(family.architectures) <= set(registry.BUILT_IN) - registry.ENCODERS
]
QUICK = ("qwen2",)


def verified(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    capsys.readouterr()
    code = main(["verify", str(folder), *FEW, "--json", *options])
    text = capsys.readouterr().out
    return code, json.loads(text[text.index("{\n") :])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SOUND]
)
def test_sound_models_agree(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer is found and compared, and none is beyond a hundredth of the tolerance."""
    options: dict[str, Any] = dict(next(iter(families()[name].cases.values())))
    code, found = verified(capsys, checkpoint(name, **options))
    assert (code, found["equal"]) == (0, True)
    for prompt in found["prompts"]:
        names = [station["name"] for station in prompt["stations"]]
        assert names == ["embeddings", *(f"layer {number}" for number in range(len(names) - 1))]
        assert len(names) > 2
        assert max(station["relative"] for station in prompt["stations"]) < TOLERANCE["float32"] / 10
        assert prompt["parting"] is None


def in_layer_1(monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    """Qwen2 whose second layer is damaged."""

    class Damaged(qwen2.PreNormLayer):
        def __init__(self, prefix: str, *arguments: Any) -> None:
            super().__init__(prefix, *arguments)
            if prefix.endswith(".1"):
                damage(self)

    monkeypatch.setattr(qwen2, "PreNormLayer", Damaged)


def wrong_eps(layer: Any) -> None:
    layer.post_attention_layernorm.eps = 1e-2


def no_rotation(layer: Any) -> None:
    layer.self_attn.rotary = None


@pytest.mark.parametrize("damage", [wrong_eps, pytest.param(no_rotation, marks=pytest.mark.slow)])
def test_the_layer_with_a_fault_is_found(
    damage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_layer_1(monkeypatch, damage)
    code, found = verified(capsys, checkpoint("qwen2"))
    assert (code, found["equal"]) == (1, False)
    first = [
        next((one["name"] for one in prompt["stations"] if one["relative"] > TOLERANCE["float32"]), None)
        for prompt in found["prompts"]
    ]
    assert first[0] == "layer 1"
    assert first[1] in ("layer 1", "layer 2")  # one token alone: position 0 is not turned anyway
    assert main(["verify", str(checkpoint("qwen2")), *FEW]) == 1
    text = capsys.readouterr().out
    assert "first part in layer 1: at token " in text and text.rstrip().endswith("They part.")


@pytest.mark.slow
def test_a_fault_behind_the_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    init = qwen2.Qwen2ForCausalLM.__init__

    def damaged(self: Any, config: Any, context: Any) -> None:
        init(self, config, context)
        self.model.norm.eps = 0.5

    monkeypatch.setattr(qwen2.Qwen2ForCausalLM, "__init__", damaged)
    assert main(["verify", str(checkpoint("qwen2")), *FEW]) == 1
    assert "so final norm or head differ" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = verified(capsys, checkpoint("llama", initializer_range=0.05), "--dtype", dtype)
    assert code == 0, found


def test_the_differing_token_and_its_log_probabilities() -> None:
    """By hand: at step 1 torch prefers token 2 by 0.5 where this side prefers 0 by 0.1; at step 0 they nearly tie."""
    ours = torch.tensor([[-1.0, -1.0001, -3.0], [-0.9, -4.0, -1.0]])
    theirs = torch.tensor([[-1.0001, -1.0, -3.0], [-1.3, -4.0, -0.8]])
    hidden = {"layer 0": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}
    other = {"layer 0": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}
    found = compare(2, Run([0, 0], ours, other), Run([1, 2], theirs, hidden), 0.5, 1e-3)
    assert found.parting is not None
    assert (found.parting.step, found.parting.ours, found.parting.theirs, found.parting.tie) == (1, 0, 2, False)
    assert found.parting.our_logprobs == pytest.approx((-0.9, -1.0))
    assert found.parting.their_logprobs == pytest.approx((-1.3, -0.8))
    assert (found.stations[0].largest, found.stations[0].relative, found.stations[0].token) == (1.0, 1.0, 1)
    assert found.first is found.stations[0]
    tie = compare(2, Run([0], ours[:1], hidden), Run([1], theirs[:1], hidden), 0.5, 1e-3)
    assert tie.parting is not None and tie.parting.tie and tie.equal


def test_numbers_that_are_not_finite_do_not_agree() -> None:
    hidden, broken = torch.ones(2, 4), torch.full((2, 4), torch.nan)
    logprobs = torch.zeros(1, 3)
    found = compare(2, Run([0], logprobs, {"layer 0": broken}), Run([0], logprobs, {"layer 0": hidden}), 1.0, 1.0)
    assert found.first is not None and not found.equal


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "1,2,211"], "is empty or not in the vocabulary; give another"),
        (["--tokens", ",".join(["1"] * 600)], "A prompt of 600 tokens, with 16 more (--max-tokens), is longer than"),
    ],
)
def test_prompts_that_do_not_fit(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint("qwen2")), *words]) == 1
    assert sentence in capsys.readouterr().err


def test_quantized_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "quantization_config": {}}')
    source = checkpoint("qwen2")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert main(["verify", str(tmp_path)]) == 1
    sentence = "is quantized already: its config.json has quantization_config; verify the model in floats that it was"
    assert sentence in capsys.readouterr().err


def test_no_tokens() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", "nowhere", "--tokens", "1,x"])
    assert stop.value.code == 2
