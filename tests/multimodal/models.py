"""Small models that read images, with their processors, pictures to show them, and what transformers says of these."""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.checkpoints import randomized
from tests.engines import distributions
from tests.servers import DEMO
from vllm_ms_models import compat

compat.declare_torchvision_operators()

# The demo's tokens are 0 ... 1023.
SPECIAL = ("<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(1024, 1029)
VOCABULARY = 1040

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}

# Each message's parts in turn; what is not text is a placeholder.
TEMPLATE = """
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}
{%- elif part['type'] in ('image', 'image_url') %}{{- 'IMAGE_HERE' }}
{%- elif part['type'] in ('video', 'video_url') %}{{- 'VIDEO_HERE' }}{%- endif %}
{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN = "Qwen2_5_VLForConditionalGeneration"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@functools.cache
def _root() -> Path:
    folder = tempfile.mkdtemp(prefix="vllm_ms_models_multimodal_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def tokenizer(image: str, video: str = "") -> Any:
    made = Qwen2Tokenizer.from_pretrained(DEMO)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.chat_template = TEMPLATE.replace("IMAGE_HERE", image).replace("VIDEO_HERE", video)
    return made


@dataclass(frozen=True)
class Case:
    """A model of one kind: `make` gives torch's, and its processor; `image` is what stands for one in a prompt."""

    make: Callable[[], tuple[torch.nn.Module, Any]]
    image: str
    architecture: str = "LlavaForConditionalGeneration"

    dtype: torch.dtype = torch.float32  # of the weights on disk

    @functools.cached_property
    def folder(self) -> Path:
        model, processor = self.make()
        folder = new_folder()
        model.to(self.dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def reference(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype).eval()

    @functools.cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.folder)


def new_folder() -> Path:
    """Removed at the end of this process."""
    return Path(tempfile.mkdtemp(dir=_root()))


def _randomized(model: torch.nn.Module, spread: float) -> torch.nn.Module:
    model.config.initializer_range = spread
    return randomized(model)


def _llava(vision: Any, text: Any, strategy: str, layers: Any, spread: float = 0.2) -> tuple[torch.nn.Module, Any]:
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layers,
    )
    clip = isinstance(vision, CLIPVisionConfig)
    size = {"height": 56, "width": 56}
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size) if clip else SiglipImageProcessor(size=size)
    words = tokenizer("<image>")
    processor = LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
        chat_template=words.chat_template,
    )
    return _randomized(LlavaForConditionalGeneration(config), spread), processor


def _qwen(
    spread: float = 0.2, sections: Sequence[int] = (2, 3, 3), vision_size: int = 48, **options: Any
) -> tuple[torch.nn.Module, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": vision_size,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": options.get("hidden_size", 64),
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": rope} | options,
        vision_config=vision,
        image_token_id=IMAGE_PAD,
        video_token_id=VIDEO_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=options.get("tie_word_embeddings", False),
    )
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 24}
    words = tokenizer(QWEN_IMAGE, QWEN_VIDEO)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=sizes), words, Qwen2VLVideoProcessor(size=sizes), chat_template=words.chat_template
    )
    return _randomized(Qwen2_5_VLForConditionalGeneration(config), spread), processor


CASES: dict[str, Case] = {
    "llava, CLIP and Llama": Case(
        lambda: _llava(CLIPVisionConfig(**_VISION), LlamaConfig(**_TEXT), "default", -2), "<image>"
    ),
    "llava, SigLIP and Qwen2": Case(
        lambda: _llava(SiglipVisionConfig(**_VISION), Qwen2Config(**_TEXT), "full", -1), "<image>"
    ),
    "llava, CLIP and Mistral, two layers": Case(
        lambda: _llava(CLIPVisionConfig(**_VISION), MistralConfig(**_TEXT, sliding_window=24), "full", [-2, 1]),
        "<image>",
    ),
    "qwen2_5_vl": Case(_qwen, QWEN_IMAGE, QWEN),
    "qwen2_5_vl, tied": Case(lambda: _qwen(tie_word_embeddings=True, num_key_value_heads=1), QWEN_IMAGE, QWEN),
}


# For 16 bits: wide enough that what rounding does is no matter of chance. Heads of towers are 16, and 80 as published.
_LARGE = _TEXT | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
LARGE: dict[str, Case] = {
    "llava": Case(
        lambda: _llava(CLIPVisionConfig(**_VISION | {"hidden_size": 64}), LlamaConfig(**_LARGE), "default", -2, 0.06),
        "<image>",
        dtype=torch.bfloat16,
    ),
    "qwen2_5_vl": Case(lambda: _qwen(0.06, (4, 6, 6), 320, **_LARGE), QWEN_IMAGE, QWEN, dtype=torch.bfloat16),
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A gradient with rectangles of random colours in it."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack((rows * 255 // height, columns * 255 // width, (rows + columns) % 256), -1).astype(np.uint8)
    for _ in range(4):
        top, left = random.integers(height), random.integers(width)
        pixels[top : top + height // 2, left : left + width // 2] = random.integers(256, size=3)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Prompt:
    """`text` has a placeholder for each of `images` and `videos` (`[frames, height, width, 3]`, 2 a second)."""

    text: str
    images: Sequence[Image.Image] = ()
    videos: Sequence[np.ndarray] = ()

    def for_vllm(self) -> dict[str, Any]:
        videos = [(frames, {**_metadata(frames), "do_sample_frames": False}) for frames in self.videos]
        data = {"image": list(self.images), "video": videos}
        data = {modality: items for modality, items in data.items() if items}
        return {"prompt": self.text} | ({"multi_modal_data": data} if data else {})

    def for_torch(self, case: Case) -> Any:
        given: dict[str, Any] = {"images": list(self.images)} if self.images else {}
        if self.videos:
            metadata = [_metadata(frames) for frames in self.videos]
            given |= {"videos": list(self.videos), "video_metadata": metadata, "do_sample_frames": False}
        return case.processor(text=self.text, return_tensors="pt", **given)


def _metadata(frames: np.ndarray) -> dict[str, Any]:
    count = len(frames)
    return {
        "fps": 2.0,
        "duration": count / 2,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
    }


def video(frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture that moves to the right."""
    first = np.asarray(picture(width, height, seed))
    return np.stack([np.roll(first, 9 * frame, 1) for frame in range(frames)])


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, the logits that chose them (float32 `[tokens, vocab]`), the prompt's tokens with placeholders."""

    tokens: list[int]
    logits: torch.Tensor
    prompt: list[int] = field(default_factory=list)

    @property
    def margin(self) -> float:
        best = self.logits.topk(2, -1).values
        return (best[:, 0] - best[:, 1]).min().item()


@torch.inference_mode()
def greedy(case: Case, model: torch.nn.Module, prompt: Prompt, tokens: int) -> Answer:
    inputs = prompt.for_torch(case)
    result = model.generate(
        **inputs.to(model.dtype),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = inputs["input_ids"][0].tolist()
    return Answer(result.sequences[0, len(ids) :].tolist(), torch.cat(result.logits).float(), ids)


@torch.inference_mode()
def logprobs(case: Case, model: torch.nn.Module, prompt: Prompt, tokens: Sequence[int]) -> np.ndarray:
    """What a model says of `tokens` after a prompt, `[tokens, vocab]`."""
    inputs = prompt.for_torch(case).to(model.dtype)
    for name, more in (("input_ids", list(tokens)), ("attention_mask", [1] * len(tokens))):
        inputs[name] = torch.cat((inputs[name], torch.tensor([more])), 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(tokens)))
    rows = model(**inputs).logits[0, -len(tokens) - 1 : -1].float()
    return torch.log_softmax(rows, -1).numpy()


def check(outputs: Sequence[Any], answers: Sequence[Answer], tolerance: float) -> None:
    """vLLM's answers, with all log-probabilities, are torch's: placeholders, tokens, log-probabilities."""
    for output, answer in zip(outputs, answers, strict=True):
        assert output.prompt_token_ids == answer.prompt
        assert list(output.outputs[0].token_ids) == answer.tokens
        found = distributions(output.outputs[0].logprobs, VOCABULARY)
        wanted = torch.log_softmax(answer.logits, -1).numpy()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def decided(case: Case, model: torch.nn.Module, given: Sequence[Prompt], tokens: int, least: float) -> list[Answer]:
    """Torch's answers, none of whose tokens was chosen by less than `least`."""
    answers = []
    for prompt in given:
        answer = greedy(case, model, prompt, tokens)
        assert answer.margin > least, f"{prompt.text!r} is not decided; change it"
        answers.append(answer)
    return answers


def prompts(image: str) -> list[Prompt]:
    """Of every shape: wide, high, small, large, one picture twice, two pictures, none."""
    wide, high = picture(120, 40, 1), picture(30, 150, 2)
    return [
        Prompt(f"What is {image}this?", [wide]),
        Prompt(f"{image}Spell it.", [high]),
        Prompt("What is the opposite of hot?"),
        Prompt(f"Compare {image} with {image}, please", [wide, picture(56, 56, 3)]),
        Prompt(f"Twice: {image} and {image}", [high, high]),
        Prompt(f"Large {image}", [picture(300, 200, 4)]),
    ]
