import pytest

from tptrain.monitor.step_timer import StepTimer


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def fail_in_a_pause(timer, clock):
    with timer.paused():
        clock.now += 9
        raise KeyError


@pytest.fixture
def clock():
    return Clock()


def steps(timer, clock, count, seconds):
    for _ in range(count):
        clock.now += seconds
        timer.step()


def test_start_up_and_pauses_are_left_out(clock):
    timer = StepTimer(clock)
    clock.now += 500  # start-up
    timer.start()
    steps(timer, clock, 2, 3.0)
    with timer.paused():  # evaluation
        clock.now += 100
        with timer.paused():  # a checkpoint in it
            clock.now += 50
        clock.now += 7
    steps(timer, clock, 2, 5.0)
    assert timer.take() == pytest.approx((2 * 3 + 2 * 5) / 4)


def test_each_record_covers_the_steps_since_the_last_one(clock):
    timer = StepTimer(clock)
    assert timer.take() is None
    assert timer.overall() is None
    timer.start()
    steps(timer, clock, 10, 2.0)
    assert timer.take() == pytest.approx(2)
    assert timer.take() is None
    steps(timer, clock, 5, 4.0)
    assert timer.take() == pytest.approx(4)
    assert timer.overall() == pytest.approx((10 * 2 + 5 * 4) / 15)


def test_a_record_taken_inside_a_pause_and_an_evaluation_that_fails(clock):
    timer = StepTimer(clock)
    timer.start()
    steps(timer, clock, 1, 2.0)
    timer.pause()
    clock.now += 30
    assert timer.take() == pytest.approx(2)
    timer.resume()
    with pytest.raises(KeyError):
        fail_in_a_pause(timer, clock)
    steps(timer, clock, 1, 4.0)
    assert timer.take() == pytest.approx(4)
