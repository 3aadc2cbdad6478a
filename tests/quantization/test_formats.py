"""What a description says about each module, and one sentence for each thing in it that cannot be served."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.quantization.writers_compressed import SCHEMES as COMPRESSED
from tests.quantization.writers_compressed import TENSOR, TOKEN, WEIGHTS, config
from tests.quantization.writers_others import AWQ_CONFIG, FP8_CONFIG, META, gptq_config
from vllm_ms_models.checkpoint import CheckpointError
from vllm_ms_models.quantization.formats import from_config
from vllm_ms_models.quantization.formats.common import Renamed
from vllm_ms_models.quantization.formats.golden_stick import GoldenStick
from vllm_ms_models.quantization.formats.modelslim import ModelSlim
from vllm_ms_models.quantization.specs import (
    AwqWeight,
    FloatWeight,
    Fp8Weight,
    GptqWeight,
    Int8Product,
    Int8Weight,
    PackedWeight,
    Spec,
)

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.k_proj", "model.layers.1.mlp.up_proj"
DYNAMIC = Int8Weight("dynamic")
INT8 = config("int-quantized", WEIGHTS, TOKEN)
PACKED = COMPRESSED["packed w4a16"].config


def fails(call: Callable[[], object], *texts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    for text in texts:
        assert re.search(text, message), message
    assert "\n" not in message and message.endswith(".")


def changed(base: Any, path: str, value: Any) -> dict[str, Any]:
    """`base` with the setting at `path` (steps by dots) replaced, or removed (`...`)."""
    result: dict[str, Any] = copy.deepcopy(dict(base))
    place = result
    *steps, last = path.split("/")
    for step in steps:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


def test_without_mindspore_and_torch() -> None:
    """Every vLLM process checks the description; most of them never start MindSpore."""
    code = "import sys, vllm_ms_models.quantization.formats; print({'mindspore', 'torch', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- which module has which scheme -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "module", "spec"),
    [
        ({}, Q, DYNAMIC),
        ({}, "lm_head", FloatWeight()),
        ({"ignore": []}, "lm_head", DYNAMIC),
        ({"ignore": [Q]}, Q, FloatWeight()),
        ({"ignore": [Q]}, Q.replace("q_proj", "k_proj"), DYNAMIC),
        ({"ignore": ["self_attn.q_proj", "q_proj", "layers.0"]}, Q, DYNAMIC),  # not exact names
        ({"ignore": ["re:.*q_proj"]}, Q, FloatWeight()),
        ({"ignore": ["re:.*q_proj"]}, K, DYNAMIC),
        ({"ignore": [r"re:model\.layers\.1\."]}, K, DYNAMIC),
        ({"ignore": ["re:q_proj"]}, Q, DYNAMIC),  # patterns match from the beginning
        ({"ignore": ["Linear"]}, Q, FloatWeight()),
        ({"config_groups/group_0/targets": ["re:.*self_attn.*"]}, UP, FloatWeight()),
        ({"config_groups/group_0/targets": ["re:.*self_attn.*"]}, Q, DYNAMIC),
        ({"config_groups/group_0/targets": [Q]}, Q, DYNAMIC),
        ({"config_groups/group_0/targets": ["q_proj"]}, Q, FloatWeight()),
    ],
)
def test_compressed_tensors_targets(changes: dict[str, Any], module: str, spec: Spec) -> None:
    settings: dict[str, Any] = INT8
    for path, value in changes.items():
        settings = changed(settings, path, value)
    assert from_config(settings).spec(module) == spec


def test_compressed_tensors_groups() -> None:
    """A name counts more than the class; a group may have its own format."""
    packed = changed(PACKED, "config_groups/group_0/targets", [Q])["config_groups"]["group_0"]
    both = changed(INT8, "format", "mixed-precision")
    both["config_groups"]["group_0"]["format"] = "int-quantized"
    both["config_groups"]["group_1"] = packed | {"format": "pack-quantized"}
    format = from_config(both)
    assert format.spec(Q) == PackedWeight(4, 32)
    assert format.spec(UP) == DYNAMIC
    both["config_groups"]["group_1"]["targets"] = ["Linear"]
    fails(lambda: from_config(both).spec(Q), "two groups", Q)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("w8a8 dynamic", DYNAMIC),
        ("w8a8 dynamic, one scale", Int8Weight("dynamic", per_tensor=True)),
        ("w8a8 dynamic, asymmetric weights", Int8Weight("dynamic", zero="weight_zero_point")),
        ("w8a8 static", Int8Weight("static")),
        ("w8a8 static, asymmetric", Int8Weight("static", input_offset=True)),
        ("w8a16", Int8Weight("float")),
        ("w8a16 in groups", Int8Weight("float", group_size=32)),
        ("packed w4a16", PackedWeight(4, 32)),
        ("packed w4a16, asymmetric", PackedWeight(4, 16, zeros=True)),
        ("packed w4a16, by channel", PackedWeight(4, 0, zeros=True)),
        ("packed w4a16, activation order", PackedWeight(4, 16, ordered=True)),
    ],
)
def test_compressed_tensors_schemes(name: str, spec: Spec) -> None:
    settings = COMPRESSED[name].config
    assert settings is not None
    assert from_config(settings).spec(Q) == spec


def test_fp8() -> None:
    assert from_config(FP8_CONFIG).spec(Q) == Fp8Weight("weight_scale_inv", (32, 24))
    assert from_config(FP8_CONFIG, True).spec(Q) == Fp8Weight("weight_scale_inv", (32, 24), requantized=True)
    assert from_config(FP8_CONFIG).spec("lm_head") == FloatWeight()
    listed = FP8_CONFIG | {"modules_to_not_convert": ["model.layers.1.mlp", "self_attn.k_proj"]}
    assert [from_config(listed).spec(module) for module in (UP, K)] == [FloatWeight()] * 2
    assert isinstance(from_config(listed).spec("model.layers.11.mlp.up_proj"), Fp8Weight)
    plain = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    assert from_config(plain).spec(Q) == Fp8Weight()


def test_awq() -> None:
    assert from_config(AWQ_CONFIG).spec(Q) == AwqWeight(16)
    assert from_config(AWQ_CONFIG).spec("lm_head") == FloatWeight()
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    assert from_config(older).spec(Q) == AwqWeight(128)
    listed = AWQ_CONFIG | {"modules_to_not_convert": ["mlp"]}
    assert from_config(listed).spec(UP) == FloatWeight()
    assert from_config(listed).spec(Q) == AwqWeight(16)


def test_gptq() -> None:
    settings = gptq_config(4, 128, True, ordered=True)
    spec = GptqWeight(4, 128, True, True, 1)
    assert from_config(settings).spec(Q) == spec
    assert from_config(settings).spec("lm_head") == FloatWeight()
    assert from_config(settings | {"lm_head": True}).spec("lm_head") == spec
    assert from_config(gptq_config(8, 0, False, 2, ordered=True)).spec(Q) == GptqWeight(8, 0, False, False, 2)
    chosen = settings | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]}
    assert [from_config(chosen).spec(module) for module in (Q, K)] == [spec, FloatWeight()]


def test_gptq_rules() -> None:
    rules = {r"-:.*\.mlp\..*": {}, r"+:.*layers\.0\..*": {"bits": 8}, r".*layers\.11\..*": {"group_size": 64}}
    format = from_config(gptq_config(4, 128, True) | {"dynamic": rules})
    assert format.spec(UP) == FloatWeight()
    assert format.spec(Q) == GptqWeight(8, 128, True, False, 1)
    assert format.spec(K) == GptqWeight(4, 64, True, False, 1)
    assert format.spec("model.layers.2.self_attn.q_proj") == GptqWeight(4, 128, True, False, 1)


def described(word: str, **others: Any) -> dict[str, Any]:
    ends = ("weight", "deq_scale", "quant_bias")
    return META | {f"{Q}.{end}": word for end in ends} | {f"{Q}.bias": "FLOAT", f"{UP}.weight": "FLOAT"} | others


def test_description_files() -> None:
    assert ModelSlim(described("W8A8")).spec(Q) == Int8Product()
    assert ModelSlim(described("W8A8")).spec(UP) == FloatWeight()
    assert ModelSlim(described("W8A8_DYNAMIC")).spec(Q) == Int8Weight("dynamic", zero="weight_offset")
    grouped = described("W8A16", group_size=64)
    assert ModelSlim(grouped).spec(Q) == Int8Weight("float", zero="weight_offset", group_size=64)
    golden = {f"{Q}.weight": "W8A8", f"{K}.weight": "W8A8_DYNAMIC"}
    assert GoldenStick(golden).spec(Q) == Int8Product(input_channels=True)
    assert GoldenStick(golden).spec(K) == Int8Weight("dynamic", scale="w_scale")


# --- what is refused ---------------------------------------------------------------------------------------------

GROUP = "config_groups/group_0"
COMPRESSED_REFUSALS: list[tuple[Any, str, Any, str]] = [
    (INT8, "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
    (INT8, "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
    (INT8, "transform_config", {"config_groups": {"R1": {}}}, "transform_config"),
    (INT8, "something_new", 1, "not known here: 'something_new'"),
    (INT8, "format", "marlin-24", "format 'marlin-24'"),
    (INT8, "format", ..., "format None"),
    (INT8, "config_groups", {}, "config_groups"),
    (INT8, "config_groups", ["group_0"], "config_groups"),
    (INT8, "config_groups", {"W8A8": ["Linear"]}, "'W8A8'.*dictionary"),
    (INT8, "ignore", "lm_head", "ignore 'lm_head'"),
    (INT8, "ignore", ["re:(("], "regular expression"),
    (INT8, f"{GROUP}/targets", [], "targets"),
    (INT8, f"{GROUP}/output_activations", TOKEN, "output_activations"),
    (INT8, f"{GROUP}/weights", None, "weights of Group 'group_0'"),
    (INT8, f"{GROUP}/weights/num_bits", 4, "num_bits 4"),
    (INT8, f"{GROUP}/weights/num_bits", True, "num_bits True"),
    (INT8, f"{GROUP}/weights/dynamic", True, "dynamic True"),
    (INT8, f"{GROUP}/weights/strategy", "block", "strategy 'block'"),
    (INT8, f"{GROUP}/weights/actorder", "group", "actorder"),
    (INT8, f"{GROUP}/weights/type", "nf4", "type 'nf4'"),
    (INT8, f"{GROUP}/weights/is_mx", True, "is_mx"),
    (INT8, f"{GROUP}/input_activations/num_bits", 4, "num_bits 4"),
    (INT8, f"{GROUP}/input_activations/symmetric", False, "symmetric False"),
    (INT8, f"{GROUP}/input_activations/strategy", "tensor", "strategy 'tensor'"),
    (INT8, f"{GROUP}/input_activations/dynamic", "local", "dynamic 'local'"),
    (INT8, f"{GROUP}/input_activations/type", "float", "type 'float'"),
    (config("int-quantized", WEIGHTS, TENSOR), f"{GROUP}/input_activations/strategy", "token", "strategy 'token'"),
    (PACKED, f"{GROUP}/input_activations", TOKEN, r"W4A8"),
    (PACKED, f"{GROUP}/weights/num_bits", 3, "num_bits 3"),
    (PACKED, f"{GROUP}/weights/group_size", 24, "group_size 24"),
    (PACKED, f"{GROUP}/weights/group_size", None, "group_size None"),
    (PACKED, f"{GROUP}/weights/strategy", "tensor", "strategy 'tensor'"),
    (PACKED, f"{GROUP}/weights/actorder", "sideways", "actorder 'sideways'"),
]
OTHER_REFUSALS: list[tuple[Any, str, Any, str]] = [
    (FP8_CONFIG, "fmt", "e5m2", "fmt 'e5m2'"),
    (FP8_CONFIG, "weight_block_size", [128], "weight_block_size"),
    (FP8_CONFIG, "weight_block_size", [128, -1], "weight_block_size"),
    (FP8_CONFIG, "activation_scheme", "none", "activation_scheme"),
    (FP8_CONFIG, "kv_cache_scheme", "static", "kv_cache_scheme"),
    (FP8_CONFIG, "store_dtype", "e8m0", "store_dtype"),
    (AWQ_CONFIG, "bits", 8, "bits 8"),
    (AWQ_CONFIG, "zero_point", False, "zero_point False"),
    (AWQ_CONFIG, "version", "gemv", "version 'gemv'"),
    (AWQ_CONFIG, "group_size", 24, "group_size 24"),
    (AWQ_CONFIG, "new", 1, "'new'"),
    (AWQ_CONFIG, "modules_to_not_convert", "mlp", "modules_to_not_convert"),
    (gptq_config(4, 128, True), "bits", 3, "bits 3"),
    (gptq_config(4, 128, True), "bits", ..., "bits None"),
    (gptq_config(4, 128, True), "checkpoint_format", "marlin", "checkpoint_format 'marlin'"),
    (gptq_config(4, 128, True), "pack_dtype", "int16", "pack_dtype"),
    (gptq_config(4, 128, True), "sym", "yes", "sym 'yes'"),
    (gptq_config(4, 128, True), "is_marlin_format", True, "is_marlin_format"),
    (gptq_config(4, 128, True), "adapter", {"lora": 1}, "adapter"),
    (gptq_config(4, 128, True), "dynamic", ["-:x"], "dynamic"),
    (gptq_config(4, 128, True), "dynamic", {"+:x": {"damp_percent": 1}}, "Rule '.:x'.*damp_percent"),
    (gptq_config(4, 128, True), "dynamic", {"+:x": {"bits": 2}}, "Rule '.:x'.*bits 2"),
    (gptq_config(4, 128, True), "dynamic", {"+:((": {}}, "regular expression"),
    (gptq_config(4, 128, True), "dynamic", {"+:a{9999999999}": {}}, "regular expression"),
    (gptq_config(4, 128, True), "modules_in_block_to_quantize", 7, "modules_in_block_to_quantize 7.*list"),
    ({"quant_method": "bitsandbytes"}, "load_in_4bit", True, "bitsandbytes.*supported are compressed-tensors, fp8"),
]


@pytest.mark.parametrize("config", [[], ["gptq"], "gptq", 7])
def test_a_description_that_is_no_dictionary(config: Any) -> None:
    fails(lambda: from_config(config), "quantization_config .*dictionary of settings is expected; correct it")


def test_block_sizes_of_thousands_of_digits() -> None:
    """Python refuses to make a number of them, in words of its own."""
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "9" * 5000 + "x1"}
    fails(lambda: from_config(config("float-quantized", blocks, None)), "block_structure")


@pytest.mark.parametrize(("base", "path", "value", "text"), COMPRESSED_REFUSALS + OTHER_REFUSALS)
def test_refused(base: Any, path: str, value: Any, text: str) -> None:
    fails(lambda: from_config(changed(base, path, value)), text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["W8A8"], "dictionary"),
        (described("W4A8_DYNAMIC"), "W4A8_DYNAMIC.*q_proj.*supported are FLOAT, W8A8"),
        (described("W8A8_MIX"), "W8A8_MIX"),
        (described("w8a8"), "w8a8"),
        (described(8), "scheme 8"),  # type: ignore[arg-type]
        (described("W8A8", kv_quant_type="C8"), "kv_quant_type 'C8'"),
        (described("W8A8", fa_quant_type="FAQuant"), "fa_quant_type"),
        (described("W8A8", metadata={"quarot": {}}), "metadata"),
        (described("W8A8", group_size=24), "group_size 24"),
        (described("W8A8", novelty=1), "novelty"),
        (described("W8A8") | {f"{Q}.deq_scale": "FLOAT"}, "FLOAT.*deq_scale.*W8A8.*weight"),
        ({"rank_0": {f"{Q}.weight": "W8A8SC"}}, "W8A8SC"),
    ],
)
def test_refused_descriptions(content: Any, text: str) -> None:
    fails(lambda: ModelSlim(content), text)


def test_a_weight_that_is_not_described() -> None:
    fails(lambda: ModelSlim(described("W8A8")).spec(K), f"no scheme for {K}.weight")
    fails(lambda: GoldenStick({f"{Q}.weight": "W4A16"}), "W4A16")
    fails(lambda: GoldenStick({f"{Q}.weight": "W8A8", "metadata": {}}), "metadata")


def test_modules_of_other_names() -> None:
    """Floats where one of a module's names says so; a description that has it under another name is found."""
    prefixes = (("model.language_model.", "model."), ("model.visual.", "visual."))
    ignored = ["lm_head", "model.visual.merger", "re:visual.*qkv"]
    renamed = Renamed(from_config(INT8 | {"ignore": ignored}), prefixes)
    for module in ("visual.merger", "visual.blocks.0.attn.qkv", "lm_head"):
        assert renamed.spec(module) == FloatWeight()
    assert renamed.spec("visual.blocks.0.attn.proj") == renamed.spec(Q) == DYNAMIC
    described = Renamed(ModelSlim(META | {f"model.language_model.{Q.removeprefix('model.')}.weight": "W8A8"}), prefixes)
    assert described.spec(Q) == ModelSlim(META | {f"{Q}.weight": "W8A8"}).spec(Q)
    fails(lambda: described.spec(K), f"no scheme for {K}.weight")
