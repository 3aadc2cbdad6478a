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

    @functools.cached_property
    def folder(self) -> Path:
        model, processor = self.make()
        folder = Path(tempfile.mkdtemp(dir=_root()))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    def reference(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype).eval()

    @functools.cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.folder)


def _randomized(model: torch.nn.Module) -> torch.nn.Module:
    model.config.initializer_range = 0.2
    return randomized(model)


def _llava(vision: Any, text: Any, strategy: str, layers: Any) -> tuple[torch.nn.Module, Any]:
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
    return _randomized(LlavaForConditionalGeneration(config)), processor


def _qwen(**options: Any) -> tuple[torch.nn.Module, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 64,
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
    return _randomized(Qwen2_5_VLForConditionalGeneration(config)), processor


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
    "qwen2_5_vl": Case(_qwen, QWEN_IMAGE),
    "qwen2_5_vl, tied": Case(lambda: _qwen(tie_word_embeddings=True, num_key_value_heads=1), QWEN_IMAGE),
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
    """`text` has a case's placeholder for each of `images`."""

    text: str
    images: Sequence[Image.Image] = ()

    def for_vllm(self) -> dict[str, Any]:
        data = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.text, **data}


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
    inputs = case.processor(text=prompt.text, images=list(prompt.images) or None, return_tensors="pt")
    result = model.generate(
        **inputs.to(model.dtype),
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = inputs["input_ids"][0].tolist()
    return Answer(result.sequences[0, len(ids) :].tolist(), torch.cat(result.logits).float(), ids)


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
