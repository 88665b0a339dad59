"""What nobody should type, and machines that are broken: one sentence and the right exit code."""

import os
from itertools import islice

import pytest

ONE_SENTENCE = "error: "


@pytest.mark.parametrize(
    "arguments",
    [["eval", "--text", "PATH"], ["generate", "--prompt-file", "PATH"]],
    ids=["eval", "generate"],
)
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_not_a_plain_file_is_not_read(run, seqlm_command, arguments, kind):
    """A device may never end and a pipe never begin: standard input stands for both."""
    path = {"device": "/dev/zero", "pipe": "pipe", "folder": "."}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    result = seqlm_command(*(path if word == "PATH" else word for word in arguments))
    assert result.code == 3 and f"{path}: this is not a plain file" in result.err
    assert "or - and pipe" in result.err


def test_millions_of_samples_are_written_one_after_another(run, monkeypatch):
    """The first text comes at once: memory does not depend on how many were asked for."""
    from seqlm.cli import generate as command
    from seqlm.ui import Screen

    written = []

    class Enough(Exception):
        pass

    def write(self: Screen, text: str) -> None:
        written.append(text)
        if len(written) > 50:
            raise Enough

    monkeypatch.setattr(Screen, "write", write)
    with pytest.raises(Enough):
        command._write(Screen(), run, "", 10**15, 0, {"chars": 2})


def test_texts_wait_in_order_without_being_remembered():
    """What was written is forgotten: a set of ended texts would grow with --samples."""
    from seqlm.cli.generate import _in_order

    pieces = _in_order((number, "x", True) for number in range(10**9))
    assert [number for number, _ in islice(pieces, 1000)] == list(range(1000))
    assert len(pieces.gi_frame.f_locals["ended"]) <= 1
