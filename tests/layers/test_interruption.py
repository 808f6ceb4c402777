"""A KeyboardInterrupt waits for the end of a block, and is never lost."""

import signal
import threading

import pytest

from rankdyna_trainer.layers.interruption import interrupt_held_back

pytestmark = pytest.mark.usefixtures("interruptible")


def test_the_block_is_finished_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("block")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_is_let_through() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_held_back():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_of_a_program_is_called_once_and_stays() -> None:
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        received.append(number)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with interrupt_held_back():
            signal.raise_signal(signal.SIGINT)
            assert not received
        assert received == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_error_in_the_block_passes() -> None:
    with pytest.raises(ValueError, match="mine"), interrupt_held_back():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_and_where_interrupts_are_ignored_nothing_is_changed() -> None:
    seen = []

    def block() -> None:
        with interrupt_held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        block()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]
