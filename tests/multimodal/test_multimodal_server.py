"""`vllm serve` of models that read images, asked through OpenAI's client with `data:` URLs, against transformers."""

import base64
import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.multimodal.models import CASES, QWEN, Answer, Case, Prompt, greedy, picture, video
from tests.reference.torch_reference import LEAST_MARGIN
from tests.servers import Server, serve

pytestmark = pytest.mark.serving

TOKENS = 16
Message = dict[str, Any]


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def message(*parts: str | bytes) -> Message:
    """Of a user: texts and encoded images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def torch_answer(case: Case, model: torch.nn.Module, messages: list[Message]) -> Answer:
    """To the same messages, by transformers' own chat template and processor."""
    images, shown = [], []
    for given in messages:
        parts = given["content"] if isinstance(given["content"], list) else [{"type": "text", "text": given["content"]}]
        for part in parts:
            if part["type"] == "image_url":
                images.append(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))))
        shown.append(given | {"content": [{"type": "image"} if p["type"] == "image_url" else p for p in parts]})
    text = case.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    return greedy(case, model, Prompt(text, [image.convert("RGB") for image in images]), TOKENS)


@pytest.fixture(
    scope="module", params=[pytest.param("llava, CLIP and Llama", marks=pytest.mark.slow), "qwen2_5_vl"], ids=str
)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[Server, Case, torch.nn.Module]]:
    case = CASES[request.param]
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
    with serve(case.folder, *options, "--limit-mm-per-prompt", '{"image": 3}') as server:
        yield server, case, case.reference()


def ask(server: Server, messages: list[Message], **options: Any) -> Any:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}} | options
    return server.client.chat.completions.create(model="tiny", messages=messages, **asked)


def conversations() -> list[list[Message]]:
    small, wide, high = (encoded(picture(*size, seed)) for seed, size in enumerate([(40, 40), (150, 60), (61, 133)]))
    jpeg = encoded(picture(90, 120, 7), "JPEG")
    palette = encoded(picture(64, 64, 8).quantize(16))
    reply = {"role": "assistant", "content": "A picture."}
    two_turns = [message("What is this?", small), reply, message("And this?", wide)]
    return [
        [message("What is in the picture? ", wide)],
        [message(high, "Spell it.")],
        [message("Compare ", small, " and ", high, ", then ", small)],
        [{"role": "user", "content": "What is 12 + 7?"}],
        two_turns,
        [message("Of a camera: ", jpeg)],
        [message("Sixteen colours: ", palette)],
    ]


def test_the_same_text_as_transformers(served: tuple[Server, Case, torch.nn.Module]) -> None:
    """All at once, and again one by one, when images and prefixes are known."""
    server, case, model = served
    asked = conversations()
    answers = [torch_answer(case, model, messages) for messages in asked]
    wanted = [case.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
    assert min(answer.margin for answer in answers) > LEAST_MARGIN, [answer.margin for answer in answers]
    wanted = [text.rstrip("\ufffd") for text in wanted]  # vLLM waits for the rest of a character
    assert len(set(wanted)) == len(wanted)
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda messages: ask(server, messages), asked))
    for replies in (together, [ask(server, messages) for messages in asked]):
        assert [reply.choices[0].message.content for reply in replies] == wanted
        assert [reply.usage.prompt_tokens for reply in replies] == [len(answer.prompt) for answer in answers]


def film(frames: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A file of them, two a second, and what is decoded from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        height, width = frames.shape[1:3]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 2, (width, height))
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        reader = cv2.VideoCapture(str(path))
        decoded = [cv2.cvtColor(reader.read()[1], cv2.COLOR_BGR2RGB) for _ in frames]
        return path.read_bytes(), np.stack(decoded)


def test_video(served: tuple[Server, Case, torch.nn.Module]) -> None:
    server, case, model = served
    data, frames = film(video(4, 84, 112, 5))
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    if case.architecture != QWEN:  # it has no video
        with pytest.raises(openai.BadRequestError):
            ask(server, messages)
        return
    shown = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
    text = case.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    answer = greedy(case, model, Prompt(text, videos=[frames]), TOKENS)
    assert answer.margin > LEAST_MARGIN
    wanted = case.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    reply = ask(server, messages)
    assert reply.usage.prompt_tokens == len(answer.prompt)
    assert reply.choices[0].message.content == wanted.rstrip("\ufffd")


def test_streaming(served: tuple[Server, Case, torch.nn.Module]) -> None:
    server, *_ = served
    messages = conversations()[0]
    whole = ask(server, messages).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(server, messages, stream=True)]
    assert "".join(parts) == whole


BROKEN: dict[str, tuple[list[str | bytes], str]] = {
    "too many images": (["many", *[encoded(picture(30, 30, seed)) for seed in range(4)]], "At most 3 image"),
    "cut in the middle": (["cut", encoded(picture(60, 60))[:200]], "image"),
    "not an image": (["none", b"only text"], "image"),
    "nothing": (["none", b""], "image"),
    "of no pixels": (["endless", encoded(picture(1, 400))], ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_refused(served: tuple[Server, Case, torch.nn.Module], name: str) -> None:
    server, case, _ = served
    parts, said = BROKEN[name]
    if name == "of no pixels" and "qwen" not in case.image and "<image>" in case.image:
        pytest.skip("any shape is resized and cropped")
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, [message(*parts)])
    assert said in str(error.value)
    assert ask(server, [{"role": "user", "content": "What is 12 + 7?"}]).choices[0].message.content


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
        {"type": "image_url", "image_url": {}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    ],
    ids=lambda part: str(part)[:60],
)
def test_other_parts_are_refused(served: tuple[Server, Case, torch.nn.Module], part: Message) -> None:
    server, *_ = served
    with pytest.raises(openai.BadRequestError):
        ask(server, [{"role": "user", "content": [{"type": "text", "text": "Look: "}, part]}])


def test_files_of_the_server_are_refused(served: tuple[Server, Case, torch.nn.Module]) -> None:
    """vLLM answers 500 to this, in a sentence."""
    server, *_ = served
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(openai.APIStatusError, match="allowed-local-media-path"):
        ask(server, [{"role": "user", "content": [part]}])


def test_image_in_a_longer_prompt_than_the_model_takes(served: tuple[Server, Case, torch.nn.Module]) -> None:
    server, *_ = served
    with pytest.raises(openai.BadRequestError, match=r"context length|longer than|maximum"):
        ask(server, [message("word " * 600, encoded(picture(60, 60)))])
