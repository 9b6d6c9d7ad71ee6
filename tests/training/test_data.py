"""Reading text, splitting it, batches as a function of the step, and windows that score every byte once."""

import os

import numpy as np
import pytest

from rom.training.data import WindowBatches, python_reference, read_corpus, require_length, scored_windows
from rom.training.errors import CorpusError


def test_python_reference_is_text():
    corpus = python_reference()
    assert len(corpus.tokens) > 300_000
    assert "for_stmt" in bytes(corpus.tokens).decode()


def test_split_is_contiguous_and_complete():
    corpus = python_reference()
    train, validation = corpus.split(0.1)
    assert len(validation) == len(corpus.tokens) // 10
    assert np.array_equal(np.concatenate([train, validation]), corpus.tokens)


def test_folders_are_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "2.txt").write_text("zwei ")
    (tmp_path / "a.md").write_text("eins ")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git" / "index").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    corpus = read_corpus([tmp_path, tmp_path / "a.md"])
    assert bytes(corpus.tokens) == b"eins zwei eins "
    assert corpus.files == 4


def test_undecodable_file(tmp_path):
    (tmp_path / "good.txt").write_text("grün")
    bad = tmp_path / "latin.txt"
    bad.write_bytes("grün".encode("latin-1"))
    with pytest.raises(
        CorpusError, match=r"latin\.txt is not UTF-8 text: byte 2 \(0xfc\).*--errors skip.*--errors keep"
    ):
        read_corpus([tmp_path])
    skipping = read_corpus([tmp_path], errors="skip")
    assert bytes(skipping.tokens).decode() == "grün" and skipping.skipped == (bad,)
    assert bytes(read_corpus([tmp_path], errors="keep").tokens) == "grün".encode() + b"gr\xfcn"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", r"nowhere does not exist\."),
        (lambda folder: folder, r"no text in .*Give files or folders that hold some"),
        (lambda folder: "/dev/null", r"/dev/null is neither a regular file nor a folder"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    with pytest.raises(CorpusError, match=message):
        read_corpus([make(tmp_path)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text("x")
    file.chmod(0)
    with pytest.raises(CorpusError, match=r"cannot read .*secret\.txt: Permission denied"):
        read_corpus([file])


def test_read_error_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("x")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(CorpusError, match=r"cannot read .*a\.txt: Input/output error"):
        read_corpus([file])


def test_too_short_text_is_named():
    with pytest.raises(CorpusError, match="too short: 20 bytes, of which 18 are for training, and a sequence needs 19"):
        require_length(np.zeros(18, np.uint8), np.zeros(2, np.uint8), 19)
    require_length(np.zeros(19, np.uint8), np.zeros(2, np.uint8), 19)


@pytest.mark.parametrize("length", [2, 5, 19])
def test_an_epoch_makes_every_token_of_its_span_a_target_once(length):
    tokens = np.arange(19 if length == 19 else 100, dtype=np.uint8)
    batches = WindowBatches(tokens, 1, length, seed=3)
    for epoch in range(3):
        windows = [batches.batch(epoch * batches.windows + i)[0].numpy() for i in range(batches.windows)]
        assert all(np.array_equal(window, np.arange(window[0], window[0] + length)) for window in windows)
        targets = np.sort(np.concatenate([window[1:] for window in windows]))
        assert np.array_equal(targets, np.arange(targets[0], targets[0] + batches.windows * (length - 1)))
        assert len(tokens) - len(targets) <= max(2 * length, 1)


def test_batches_are_a_function_of_the_step():
    tokens = np.random.default_rng(0).integers(256, size=5000).astype(np.uint8)
    straight = WindowBatches(tokens, 4, 32, seed=7)
    batches = [straight.batch(step) for step in range(60)]
    jumping = WindowBatches(tokens, 4, 32, seed=7)
    for step in (59, 3, 41, 0):
        assert jumping.batch(step).equal(batches[step])
    assert not WindowBatches(tokens, 4, 32, seed=8).batch(0).equal(batches[0])
    assert batches[0].shape == (4, 32)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 6), (8, 8, 6), (9, 8, 6), (100, 8, 6), (100, 8, 8), (57, 1, 1)]
)
def test_every_token_but_the_first_is_scored_once(length, window, stride):
    if window == 1:
        window, stride = 2, 1
    scored = []
    for start, stop, count in scored_windows(length, window, stride):
        assert 0 <= start < stop <= length and stop - start <= window
        assert start == 0 or stop - count - start >= window - stride
        scored += range(stop - count, stop)
    assert scored == list(range(1, length))
