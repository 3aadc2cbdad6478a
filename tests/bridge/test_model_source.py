"""`--additional-config '{"model_source": ...}'` without any suite installed: one sentence, with what to install."""

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoint


def configure(**options: Any) -> Any:
    """vLLM's configuration of a server for a tiny Llama."""
    from vllm import EngineArgs

    return EngineArgs(
        str(checkpoint("llama")), skip_tokenizer_init=True, max_model_len=64, additional_config=options
    ).create_engine_config()


def test_our_own_is_the_default() -> None:
    configure(model_source="native")


@pytest.mark.parametrize("name", ["mindtwo", "", None, ["mindone"]])
def test_an_unknown_source(name: Any) -> None:
    with pytest.raises(ValueError, match=r"model_source .* is not known; it is one of native, mindone, mindformers\."):
        configure(model_source=name)


def test_an_unknown_key_beside_a_source() -> None:
    with pytest.raises(ValueError, match=r"--additional-config .* is not understood; it may hold .*'model_source'"):
        configure(model_source="native", model_sources="mindone")


def test_mindone_is_not_installed() -> None:
    with pytest.raises(
        ValueError, match=r"mindone 0\.5\.0, and none is installed; run `pip install --no-deps mindone==0\.5\.0`"
    ):
        configure(model_source="mindone")


def test_mindone_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "mindone-0.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mindone\nVersion: 0.4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"works with mindone 0\.5\.0, and 0\.4\.0 is installed; run `pip install"):
        configure(model_source="mindone")
