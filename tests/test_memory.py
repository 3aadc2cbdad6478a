"""How much memory the KV cache gets, and the sentences when something does not fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ms_models.memory import (
    DEFAULT_CACHE,
    DEFAULT_UTILIZATION,
    ENCODER_RESERVE,
    GIB,
    RESERVE,
    HostMemory,
    InsufficientMemoryError,
    cache_size,
    check_weights,
    device_cache_size,
    gib,
)

HOST = HostMemory(total=32 * GIB, available=24 * GIB)
sizes = st.integers(0, 64 * GIB)


def size(**changes: Any) -> int:
    """`cache_size` of an engine that asks for more than it can have, with `changes`."""
    plain: dict[str, Any] = {
        "host": HOST,
        "utilization": 0.5,
        "resident": 2 * GIB,
        "one_sequence": GIB,
        "most": 256 * GIB,
        "requested": None,
    }
    return cache_size(**(plain | changes))


def test_sizes_are_written_in_gibibytes():
    assert [gib(n) for n in (0, GIB // 2, 3 * GIB, 15_231_233_024)] == ["0.00 GiB", "0.50 GiB", "3.00 GiB", "14.19 GiB"]


def test_weights_that_just_fit():
    check_weights(HOST.available - RESERVE, HOST)


def test_weights_that_do_not_fit():
    with pytest.raises(InsufficientMemoryError) as caught:
        check_weights(HOST.available - RESERVE + 1, HOST)
    assert str(caught.value) == (
        "The model's weights need 23.00 GiB and 1.00 GiB for working space, but only 24.00 GiB of this host's "
        "32.00 GiB memory is available; free memory, or serve a smaller or quantized model."
    )


def test_the_share_of_the_host_counts_what_the_process_holds():
    assert size() == 16 * GIB - 2 * GIB
    assert size(resident=0) == 16 * GIB
    assert size(utilization=0.25) == 6 * GIB


def test_never_more_than_is_free():
    assert size(utilization=0.99) == HOST.available - RESERVE


def test_never_more_than_can_run_at_once():
    assert size(most=3 * GIB) == 3 * GIB


def test_the_default_is_modest():
    """Who said nothing gets the default cache, or one sequence where that is larger, not nearly the whole host."""
    assert size(utilization=DEFAULT_UTILIZATION) == DEFAULT_CACHE
    assert size(utilization=DEFAULT_UTILIZATION, one_sequence=9 * GIB) == 9 * GIB
    assert size(utilization=DEFAULT_UTILIZATION, most=GIB) == GIB
    assert size(utilization=0.91) > DEFAULT_CACHE


def test_vllm_has_the_default_that_stands_for_nothing_said():
    from vllm.config import CacheConfig

    assert CacheConfig().gpu_memory_utilization == DEFAULT_UTILIZATION


def test_a_requested_size_wins():
    assert size(requested=5 * GIB, utilization=0.01, most=GIB) == 5 * GIB
    assert size(requested=HOST.available - RESERVE) == 23 * GIB


def test_a_requested_size_that_is_not_free():
    with pytest.raises(InsufficientMemoryError) as caught:
        size(requested=HOST.available - RESERVE + 1)
    assert str(caught.value) == (
        "--kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE) asks for 23.00 GiB, but"
        " only 23.00 GiB of this host's 32.00 GiB memory is available; "
        "ask for less or free memory."
    )


def test_no_negative_sizes_in_the_sentence():
    with pytest.raises(InsufficientMemoryError, match=r"asks for 1\.00 GiB, but only 0\.00 GiB of"):
        size(requested=GIB, host=HostMemory(32 * GIB, GIB // 2))
    with pytest.raises(InsufficientMemoryError, match=r"needs 1\.00 GiB, but only 0\.00 GiB is left"):
        size(resident=30 * GIB)


def test_one_sequence_must_fit():
    with pytest.raises(InsufficientMemoryError) as caught:
        size(one_sequence=15 * GIB)
    assert str(caught.value) == (
        "The KV cache of one sequence of --max-model-len tokens needs 15.00 GiB, but only 14.00 GiB is left for it "
        "(24.00 GiB of 32.00 GiB available, --gpu-memory-utilization 0.5); lower --max-model-len or free memory."
    )


def test_ranks_share_the_host():
    """Each of four has a quarter of what there is, of what may be taken, and of the default; all weights must fit."""
    assert size(ranks=4) == 4 * GIB - 2 * GIB
    assert size(ranks=4, utilization=0.99, resident=0) == HOST.available // 4 - RESERVE
    assert size(ranks=4, utilization=DEFAULT_UTILIZATION, one_sequence=1) == DEFAULT_CACHE // 4
    check_weights(HOST.available - 4 * RESERVE, HOST, ranks=4)
    with pytest.raises(InsufficientMemoryError, match=r"need 23\.00 GiB and 2\.00 GiB for working space"):
        check_weights(HOST.available - RESERVE, HOST, ranks=2)
    with pytest.raises(InsufficientMemoryError) as caught:
        size(ranks=2, requested=12 * GIB)
    assert str(caught.value) == (
        "--kv-cache-memory-bytes (or VLLM_CPU_KVCACHE_SPACE) asks for 12.00 GiB, but only 11.00 GiB of this host's "
        "32.00 GiB memory is available to each of 2 ranks; ask for less or free memory."
    )
    with pytest.raises(InsufficientMemoryError, match=r"only 6\.00 GiB is left for it to each of 2 ranks"):
        size(ranks=2, one_sequence=7 * GIB)


@given(sizes, sizes, st.sampled_from((0.1, 0.5, 0.9, DEFAULT_UTILIZATION)), sizes, sizes, st.integers(1, 256))
def test_whatever_is_given_fits(total, available, utilization, resident, one_sequence, sequences):
    """A size that is returned holds one sequence, leaves the reserve, and is never more than sequences can use."""
    host = HostMemory(total, min(available, total))
    most = one_sequence * sequences
    try:
        given = cache_size(host, utilization, resident, one_sequence, most, None)
    except InsufficientMemoryError:
        assert one_sequence > min(int(utilization * total) - resident, host.available - RESERVE)
    else:
        assert one_sequence <= given <= min(most, host.available - RESERVE)
        assert given + resident <= utilization * total


# --- a device's own memory -----------------------------------------------------------------------------------------


def device_size(**changes: Any) -> int:
    plain: dict[str, Any] = {
        "device": HostMemory(total=64 * GIB, available=48 * GIB),  # weights and others have 16
        "utilization": 0.9,
        "one_sequence": GIB,
        "requested": None,
    }
    return device_cache_size(**(plain | changes))


def test_a_device_gives_what_utilization_leaves_beside_the_weights():
    assert device_size() == int(0.9 * 64 * GIB) - 16 * GIB - RESERVE
    assert device_size(utilization=0.5) == 32 * GIB - 16 * GIB - RESERVE
    assert device_size(requested=40 * GIB) == 40 * GIB
    assert device_size() - device_size(reserve=ENCODER_RESERVE) == 3 * GIB


def test_what_does_not_fit_on_a_device():
    with pytest.raises(
        InsufficientMemoryError, match=r"asks for 49\.00 GiB, but only 48\.00 GiB of the device's 64\.00"
    ):
        device_size(requested=49 * GIB)
    with pytest.raises(InsufficientMemoryError, match=r"needs 20\.00 GiB, but only 15\.00 GiB .*utilization 0\.5\)"):
        device_size(utilization=0.5, one_sequence=20 * GIB)
    with pytest.raises(InsufficientMemoryError, match=r"only 0\.00 GiB of the device's"):
        device_size(utilization=0.1)
