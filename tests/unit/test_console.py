"""The console's line: what is known, nothing invented, the time that is left."""

import io

from gatewise.training.console import ConsoleSink


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, records: list[dict[str, float]], seconds: float = 1.0) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    sink = ConsoleSink(total, stream=stream, clock=clock)
    for record in records:
        clock.now += seconds
        sink.write(record)
    sink.close()
    return stream.getvalue().splitlines()


def test_a_line_shows_what_the_record_holds_in_a_fixed_order() -> None:
    record = {
        "step": 20,
        "train/loss": 2.34567,
        "train/lr": 3e-3,
        "train/grad_norm": 0.5,
        "moe/max_violation": 1.25,
        "moe/drop_frac": 0.025,
        "train/tokens_per_second": 12345.6,
        "train/memory_mb": 512.4,
    }
    assert lines_of(200, [record]) == [
        "step  20/200  loss 2.3457  lr 3.00e-03  grad 0.500  imbalance 1.25  dropped 2.5%  "
        "tok/s 12,346  mem 512M"
    ]


def test_what_a_record_lacks_is_left_out() -> None:
    assert lines_of(9, [{"step": 3, "train/loss": 1.0}]) == ["step 3/9  loss 1.0000"]
    assert lines_of(9, [{"step": 9, "val/loss": 2.0, "val/bits_per_byte": 1.5}]) == [
        "step 9/9  val loss 2.0000  bits/byte 1.5000"
    ]


def test_the_time_left_follows_from_the_steps_done() -> None:
    records = [{"step": step, "train/loss": 1.0} for step in (10, 20)]
    assert lines_of(100, records, seconds=5.0)[-1].endswith("left 0m40s")
    assert lines_of(20000, records, seconds=5.0)[-1].endswith("left 2h46m")


def test_a_loss_that_is_not_finite_is_still_a_line() -> None:
    assert lines_of(9, [{"step": 3, "train/loss": float("nan"), "train/skipped_steps": 1}]) == [
        "step 3/9  loss nan  skipped 1"
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_same_words_stand_on_one_line() -> None:
    stream = Terminal()
    sink = ConsoleSink(9, stream=stream)
    sink.resume(2)
    sink.write({"step": 3, "val/loss": 1.0})
    assert "going on after step 2" in stream.getvalue()
    assert "val loss 1.0000" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_has_left_does_not_stop_the_training() -> None:
    sink = ConsoleSink(9, stream=Gone())
    for step in (1, 2):
        sink.write({"step": step, "train/loss": 1.0})
    sink.close()
