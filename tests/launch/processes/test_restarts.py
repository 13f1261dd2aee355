"""The rule of restarts, with times passed in: delays, the window, and what resets them."""

from launch.processes.restarts import LONGEST_DELAY_S, RestartLimit, Restarts


def test_delays_double_up_to_the_longest():
    restarts = Restarts(RestartLimit(9))
    delays = [restarts.died(0.0, healthy=False) for _ in range(9)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_DELAY_S, 30.0, 30.0]
    assert restarts.died(0.0, healthy=False) is None


def test_healthy_work_resets_the_delay_but_not_the_count_within_the_window():
    restarts = Restarts(RestartLimit(3, window_s=100))
    assert [restarts.died(t, healthy=False) for t in (0, 1)] == [0.5, 1.0]
    assert restarts.died(50, healthy=True) == 0.5
    assert restarts.died(99.5, healthy=True) is None
    assert restarts.died(100, healthy=True) == 0.5  # that of time 0 no longer counts
    assert restarts.count == 3


def test_a_process_that_gets_nowhere_is_given_up_however_slowly_it_dies():
    restarts = Restarts(RestartLimit(2, window_s=100))
    assert [restarts.died(t, healthy=False) for t in (0, 1000, 2000)] == [0.5, 1.0, None]


def test_without_restarts_the_first_death_is_the_end():
    assert Restarts(RestartLimit()).died(0.0, healthy=True) is None
