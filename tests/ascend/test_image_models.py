"""Models that read images and video, as test_models.py. Nothing here runs on the hardware."""

import pytest

from tests.ascend.standin import StandIn
from tests.ascend.whole_models import Answers, check
from tests.engines import distributions, engine
from tests.multimodal.models import LARGE, VOCABULARY, Case, Prompt, prompts, video
from tests.multimodal.test_multimodal_float32 import OPTIONS
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend import AscendKernels

TOKENS = 4
VIDEO = Prompt("Watch <|vision_start|><|video_pad|><|vision_end|>this", videos=[video(4, 84, 112, 1)])


def answers(case: Case, dtype: str, env: dict[str, str]) -> Answers:
    """Of pictures of several shapes, two in one prompt, none, and a video where the model reads these."""
    from vllm import SamplingParams

    given = [*prompts(case.image), *([VIDEO] if case is LARGE["qwen2_5_vl"] else [])]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1)
    with engine(case.folder, env, dtype=dtype, async_scheduling=False, **OPTIONS) as llm:
        outputs = llm.generate([prompt.for_vllm() for prompt in given], sampling, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [(list(each.token_ids), distributions(each.logprobs, VOCABULARY)) for each in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_model_is_as_near_to_float32_as_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = check(name, lambda dtype, env: answers(LARGE[name], dtype, env), monkeypatch)
    assert {"flash_attention", "paged_attention", "apply_rotary_pos_emb", "gather"} <= called
    assert "batch_matmul" not in called  # towers have no plain attention, either


def test_what_a_picture_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels to the device and its embeddings back, once; in each step, what the tokens are replaced by."""
    from vllm import SamplingParams

    case, standin = LARGE["qwen2_5_vl"], StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    (prompt, other) = prompts(case.image)[:2]
    pixels = tuple(prompt.for_torch(case)["pixel_values"].shape)
    units, hidden = pixels[0] // 4, 256
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with engine(case.folder, dtype="bfloat16", async_scheduling=False, **OPTIONS) as llm:
        llm.generate(other.for_vllm(), sampling, use_tqdm=False)  # parameters go to the device at first use
        standin.uploads, standin.downloads = [], []
        (output,) = llm.generate(prompt.for_vllm(), sampling, use_tqdm=False)
        uploads, downloads = standin.uploads, standin.downloads
        standin.uploads, standin.downloads = [], []
        llm.generate(prompt.for_vllm(), sampling, use_tqdm=False)
        again = standin.uploads + standin.downloads
    picture, embedded = (pixels, "BFloat16"), ((units, hidden), "BFloat16")
    assert not {picture, embedded} & set(again)  # vLLM has kept the embeddings
    counts = (len(output.prompt_token_ids), 1, 1)  # tokens of the steps
    embeds = [((count, hidden), "BFloat16") for count in counts]
    assert [each for each in downloads if len(each[0]) > 1] == [embedded, *embeds]
    assert [each for each in uploads if each[1] == "BFloat16"] == [picture, *embeds]
