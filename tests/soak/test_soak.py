import pytest

from tests.soak.soaking import soak


@pytest.mark.slow
@pytest.mark.serving
def test_a_minute() -> None:
    report = soak(60, 16)
    assert report.problems() == [], report.table()
    assert report.outcomes.counts.total() > 100
