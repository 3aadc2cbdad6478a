"""`vllm-ms doctor` of a model on the Hub: only config.json and the headers of the weights are read.

The Hub is a server here that has one repository and counts the bytes of its weights that were asked for.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Its address, and how many bytes of weights each answer had."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = re.fullmatch(rf"/{NAME}/resolve/[^/]+/(.+)", path)
            if file is not None:
                self.answer_file(folder / file[1])
            elif path.startswith(f"/api/models/{NAME}"):
                names = sorted(path.name for path in folder.iterdir())
                if "/tree/" in path:
                    found: object = [
                        {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                        for name in names
                    ]
                else:
                    found = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.answer(200, json.dumps(found).encode())
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def answer_file(self, path: Path) -> None:
            if not path.is_file():
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            content, status = path.read_bytes(), 200
            headers = {"ETag": f'"{path.name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if span is not None:
                begin, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
                content, status = content[begin : end + 1], 206
            if path.suffix == ".safetensors" and self.command == "GET":
                sent.append(len(content))
            self.answer(status, content, headers)

        def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()


@pytest.mark.slow
def test_a_model_on_the_hub(tmp_path: Path) -> None:
    folder = checkpoint("llama", vocab_size=4099, hidden_size=128)
    here = judged(folder, tmp_path)
    with hub(folder) as (address, sent):
        there = judged(NAME, tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
        missing = judged("someone/else", tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
    assert here["loads"] is True
    assert there | {"model": ""} == here | {"model": ""}
    assert 0 < sum(sent) < (folder / "model.safetensors").stat().st_size / 10
    assert missing["loads"] is False
    assert "someone/else" in " ".join(missing["problems"])


def judged(model: str | Path, folder: Path, **env: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "vllm_ms_models.cli", "doctor", str(model), "--json"]
    options = ["--skip-tokenizer-init", "--max-model-len", "128", "--max-num-seqs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    run = subprocess.run([*words, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    found: dict[str, Any] = json.loads(run.stdout[run.stdout.index("{\n") :])["model"]
    return found
