"""What an operator, or a program, reads in the log."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from backend.logs import configure_logging, working_on


@pytest.fixture(autouse=True)
def _log_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_every_line_says_which_bag_is_worked_on_other_threads_too(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "worker[cuda:0]")
    log = logging.getLogger("some.library")
    with working_on(bag="0a1b"):
        log.info("decoding")
        thread = threading.Thread(target=log.warning, args=("slow",))
        thread.start()
        thread.join()
        log.info("bag=0a1b said already")
    log.info("idle")
    lines = capfd.readouterr().err.splitlines()
    assert [line.count("bag=0a1b") for line in lines] == [1, 1, 1, 0]
    assert "worker[cuda:0] INFO some.library: decoding bag=0a1b" in lines[0]


def test_json_lines_are_objects_with_the_same_names_whatever_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "worker", "json")
    log = logging.getLogger("backend.jobs")
    with working_on(bag="0a1b"):
        log.info('a "quoted"\nmessage of %s', "µm")
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("it failed")
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert first["message"] == 'a "quoted"\nmessage of µm'
    assert (first["bag"], first["process"], first["level"], first["logger"]) == (
        "0a1b",
        "worker",
        "INFO",
        "backend.jobs",
    )
    assert first["time"].endswith("+00:00") and "traceback" not in first
    assert "ValueError: why" in second["traceback"]


HOSTILE = "a\x1b[31mb\x00c\x07d\x7fe\x85f\x9b2Jg\u2028h\u2029i\nj\rk\tl"


def test_a_message_stays_one_line_that_no_terminal_obeys(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "web")
    with working_on(bag="0a\x1b1b"):
        logging.getLogger("backend").warning("GET %s: not found", f"/{HOSTILE}")
    said = capfd.readouterr().err
    assert said.endswith("\n") and len(said[:-1].splitlines()) == 1
    assert said[:-1].isprintable()
    assert r"/a\x1b[31mb\x00c\x07d\x7fe\x85f\x9b2Jg\u2028h\u2029i\nj\rk\tl: not found bag=0a\x1b1b" in said


def test_a_traceback_keeps_its_lines_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "web")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("backend").exception("it failed")
    said = capfd.readouterr().err
    assert "Traceback (most recent call last):\n  File " in said
    assert r"ValueError: a\x1b[31mb\x00c" in said
    assert all(letter.isprintable() or letter in "\n\t" for letter in said)


def test_a_json_line_stays_one_line_and_says_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "web", "json")
    logging.getLogger("backend").warning("%s", HOSTILE)
    said = capfd.readouterr().err
    assert said[:-1].isprintable() and len(said.splitlines()) == 1
    assert json.loads(said)["message"] == HOSTILE
