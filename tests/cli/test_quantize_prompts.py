"""Calibration files: what is understood, how much is taken, and which line an error names."""

import json
from pathlib import Path

import pytest

from benchmarks.models import write_tokenizer
from tests import checkpoints
from tests.cli.quantizing import SIZES
from vllm_ms_models.cli import main
from vllm_ms_models.cli.quantize.prompts import read_prompts

VOCABULARY = 211


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the words t0, t1, ..., with a chat template of one word before each message."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, VOCABULARY)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}t9 {{ m['content'] }} {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def write(path: Path, *lines: object) -> Path:
    file = path / "prompts.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_every_kind_of_line(tmp_path: Path, folder: Path) -> None:
    messages = [{"role": "user", "content": "t4"}, {"role": "assistant", "content": "t5 t6"}]
    lines = (
        {"text": "t1 t2"},
        {"prompt": "t3"},
        "",
        {"messages": messages},
        {"token_ids": [7]},
        {"prompt_token_ids": [8]},
    )
    found = read_prompts(write(tmp_path, *lines), folder, VOCABULARY, 100, 100)
    assert found.ids == [[1, 2], [3], [9, 4, 9, 5, 6], [7], [8]] and found.tokens == 10 and not found.more


@pytest.mark.parametrize(
    ("limit", "longest", "ids", "more"),
    [
        (6, 9, [[1, 2, 3], [4, 5, 6]], True),
        (5, 9, [[1, 2, 3]], True),
        (2, 9, [[1, 2]], True),
        (7, 9, [[1, 2, 3], [4, 5, 6], [7]], False),
        (9, 2, [[1, 2], [4, 5], [7]], False),
    ],
)
def test_the_first_that_fit(tmp_path: Path, limit: int, longest: int, ids: list[list[int]], more: bool) -> None:
    file = write(tmp_path, *({"token_ids": prompt} for prompt in ([1, 2, 3], [4, 5, 6], [7])))
    found = read_prompts(file, tmp_path, VOCABULARY, limit, longest)
    assert (found.ids, found.more) == (ids, more)


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[1, 2]",
        '{"question": "t1"}',
        '{"text": 3}',
        '{"token_ids": [1, -1]}',
        '{"token_ids": [211]}',
        '{"token_ids": [1.5]}',
        '{"token_ids": "t1"}',
        '{"token_ids": []}',
        '{"text": ""}',
        '{"messages": "t1"}',
        '{"messages": [{"role": "user"}], "x": 1, "y": {}}',
    ],
)
def test_bad_lines(tmp_path: Path, folder: Path, line: str) -> None:
    file = write(tmp_path, {"token_ids": [1]}, line)
    if line.startswith('{"messages": [{'):  # jinja prints nothing for what is missing: a prompt of one word
        assert read_prompts(file, folder, VOCABULARY, 99, 99).ids == [[1], [9]]
        return
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: .*\.$"):
        read_prompts(file, folder, VOCABULARY, 99, 99)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: the model's tokenizer cannot take it .*; give token_ids instead\.$"):
        read_prompts(write(tmp_path, {"text": "t1"}), tmp_path, VOCABULARY, 99, 99)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_prompts(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(file, tmp_path, VOCABULARY, 99, 99)


def test_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and nothing is written."""
    source = checkpoints.checkpoint("llama", **SIZES)
    words = ["quantize", str(source), str(tmp_path / "out"), "--scheme", "w8a8-static", "--calibration"]
    assert main([*words, str(write(tmp_path, "{"))]) == 1
    assert main([*words, str(tmp_path / "nowhere.jsonl")]) == 1
    error = capsys.readouterr().err
    assert "line 1: this is not JSON" in error and "nowhere.jsonl" in error and "Traceback" not in error
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
