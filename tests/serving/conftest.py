"""One server of the demo checkpoint for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.servers import DEMO, Server, serve


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    options = ["--served-model-name", "demo", "--max-num-seqs", "32", "--max-logprobs", "20"]
    compact = '{"backend": "xgrammar", "disable_any_whitespace": true}'  # else a JSON may be all line breaks
    with serve(DEMO, *options, "--structured-outputs-config", compact) as server:
        yield server
