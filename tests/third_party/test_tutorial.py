"""docs/add_a_model.md, followed to the letter: its commands are run, its edits made, its output compared.

In the page, indented blocks are commands (`$ ...`) with some of the lines that they print, where `...` stands for
anything and numbers may be others; or edits: lines with `-` are replaced by those with `+`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.checkpoints import random_prompts
from tests.servers import serve

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add_a_model.md"
NUMBER = re.compile(r"\d[\d.e+-]*")


@dataclass(frozen=True)
class Command:
    words: str
    prints: list[str]


@dataclass(frozen=True)
class Edit:
    old: list[str]
    new: list[str]


def blocks(text: str) -> Iterator[list[str]]:
    """Indented blocks, without the indentation."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("    "):
            block.append(line[4:])
        elif block:
            yield block
            block = []


def steps(text: str) -> Iterator[Command | Edit]:
    for block in blocks(text):
        if block[0].startswith("$ "):
            for part in "\n".join(block).split("$ ")[1:]:
                words, *prints = part.splitlines()
                yield Command(words, prints)
        elif block[0].startswith("- "):
            yield Edit(*([line[2:] for line in block if line[0] == sign] for sign in "-+"))


def test_the_page_is_understood() -> None:
    """Its first step writes the package, its last ones test it; every edit has both sides."""
    found = list(steps(PAGE.read_text()))
    commands = [step for step in found if isinstance(step, Command)]
    edits = [step for step in found if isinstance(step, Edit)]
    assert commands[0].words.startswith("vllm-ms new-model ")
    assert commands[-1].words.startswith("pytest ")
    assert len(commands) >= 8 and len(edits) >= 3
    assert all(edit.old and edit.new for edit in edits)


class Reader:
    """Somebody who does what the page says, in an empty folder; what is installed goes to a folder beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.site = folder / "site"
        tools = folder / "bin"
        tools.mkdir()
        for name, module in {"vllm-ms": "vllm_ms_models.cli", "pip": "pip", "pytest": "pytest", "python": ""}.items():
            script = tools / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {f"-m {module}" if module else ""} "$@"\n')
            script.chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PIP_TARGET": str(self.site),  # this environment stays as it is; and there may be no network
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # of pip's options that begin with "no", 0 says yes
        }

    @property
    def path(self) -> str:
        """An editable installation in a folder that is not Python's own is found by its metadata and its sources."""
        return os.pathsep.join(map(str, (self.site, self.folder, ROOT)))

    def run(self, command: Command) -> None:
        if command.words.startswith("cd "):
            self.folder /= command.words.removeprefix("cd ")
            return
        env = self.environment | {"PYTHONPATH": self.path, "PYTHONSAFEPATH": "1"}
        run = subprocess.run(command.words, shell=True, cwd=self.folder, env=env, capture_output=True, text=True)
        printed = (run.stdout + run.stderr).splitlines()
        for line in command.prints:
            wanted = re.compile(".*".join(map(re.escape, re.split(r" ?\.\.\. ?", NUMBER.sub("N", line)))))
            assert any(wanted.search(NUMBER.sub("N", text)) for text in printed), line + run.stdout + run.stderr
        bad = [line for line in command.prints if line in ("It would not load.", "They part.")]
        assert run.returncode == (1 if bad else 0), run.stdout + run.stderr

    def edit(self, edit: Edit) -> None:
        """In the one file that has the old lines, indented as they are there."""
        pattern = re.compile("".join(rf"(?P<indent{i}>[ ]*){re.escape(line)}\n" for i, line in enumerate(edit.old)))
        found = [(path, match) for path in self.folder.rglob("*.py") for match in pattern.finditer(path.read_text())]
        assert len(found) == 1, edit
        path, match = found[0]
        new = "".join(f"{match['indent0']}{line}\n" for line in edit.new)
        path.write_text(path.read_text()[: match.start()] + new + path.read_text()[match.end() :])


@pytest.mark.slow
@pytest.mark.serving
@pytest.mark.timeout(1800)  # five engines, one after another, on whatever runs the tests
def test_the_tutorial(tmp_path: Path) -> None:
    """Every step; then the model is served, and answers what transformers does."""
    reader = Reader(tmp_path)
    for step in steps(PAGE.read_text()):
        if isinstance(step, Command):
            reader.run(step)
        else:
            reader.edit(step)
    from tests.reference import torch_reference

    checkpoint = reader.folder / "checkpoint"
    prompts = random_prompts([3, 40])
    wanted = [torch_reference.greedy(torch_reference.load(checkpoint), prompt, 12) for prompt in prompts]
    options = ("--dtype", "float32", "--max-model-len", "128", "--skip-tokenizer-init", "--served-model-name", "new")
    with serve(checkpoint, *options, env={"PYTHONPATH": reader.path}) as server:
        answer = server.client.completions.create(
            model="new", prompt=prompts, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
        )
        assert [choice.token_ids for choice in answer.choices] == [one.tokens for one in wanted]
