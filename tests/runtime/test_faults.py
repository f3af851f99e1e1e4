import pytest

from flask_usage_metrics.runtime.faults import Faults


def test_what_a_block_raises_is_counted_and_goes_no_further() -> None:
    faults = Faults()
    with faults.caught("part", "so what"):
        raise ValueError("a secret")
    with faults.caught("part", "so what"):
        pass
    assert faults.counts() == {"part": 1}


def test_an_exit_is_caught_only_where_it_is_asked_for() -> None:
    faults = Faults()
    with pytest.raises(SystemExit), faults.caught("part", "so what"):
        raise SystemExit
    assert faults.counts() == {}
    with faults.caught("part", "so what", BaseException):
        raise SystemExit
    assert faults.counts() == {"part": 1}
