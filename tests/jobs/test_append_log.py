"""The append-only log: whole lines whatever happens, and only of the job that it is of."""

import errno
import json
import math
import os

import pytest

from sparing.jobs import AppendLog, LogInUse, LogMismatch, read_log

HEADER = {"job": "x", "settings": {"steps": 4, "scale": 1.5}, "version": "1"}


def test_a_log_that_never_began_is_begun_anew(tmp_path):
    AppendLog(tmp_path / "log.jsonl", {"job": 1}).close()
    log = AppendLog(tmp_path / "log.jsonl", {"job": 2})
    log.append([{"id": 0}])
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [{"job": 2}, {"id": 0}]


def begin(path, count=3):
    with AppendLog(path, HEADER) as log:
        log.append([{"id": i, "score": i / 2} for i in range(count)])


def test_records_come_back(tmp_path):
    path = tmp_path / "a" / "log.jsonl"
    begin(path)
    with AppendLog(path, HEADER) as log:
        assert log.records == [{"id": i, "score": i / 2} for i in range(3)]
        log.append([{"id": 3}])
    assert [record.get("id") for record in read_log(path)] == [None, 0, 1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    begin(path)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    whole = content[:-cut].count(b"\n")
    with AppendLog(path, HEADER) as log:
        kept = len(log.records)
        assert kept == whole - 1
        log.append([{"id": i, "score": i / 2} for i in range(kept, 3)])
    assert path.read_bytes() == content


def test_a_torn_header_is_begun_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"job": "x", "sett')
    with AppendLog(path, HEADER) as log:
        assert log.records == []
    assert read_log(path) == [HEADER]


def test_fields_that_differ_are_named(tmp_path):
    path = tmp_path / "log.jsonl"
    begin(path)
    before = path.read_bytes()
    changed = {**HEADER, "settings": {"steps": 8, "scale": 1.5}, "version": "2"}
    with pytest.raises(LogMismatch, match=r"settings\.steps was 4 and is now 8; version was '1' and is now '2'"):
        AppendLog(path, changed)
    with pytest.raises(LogMismatch, match=r"^(?!.*version)"):
        AppendLog(path, changed, ignore=["version"])
    assert path.read_bytes() == before
    with AppendLog(path, changed, force=True) as log:
        assert len(log.records) == 3


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    begin(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "{nonsense\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 of"):
        AppendLog(path, HEADER)


def test_scores_that_are_not_finite_are_strings_in_the_file_and_numbers_after(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path, HEADER) as log:
        log.append([{"score": math.nan, "scores": {"a": -math.inf}, "prompt": "nan"}])
    assert json.loads(path.read_text().splitlines()[1]) == {"score": "nan", "scores": {"a": "-inf"}, "prompt": "nan"}
    record = read_log(path)[1]
    assert math.isnan(record["score"])
    assert record["scores"]["a"] == -math.inf
    assert record["prompt"] == "nan"


def test_a_full_disk_is_said_and_leaves_the_log_intact(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    begin(path)
    before = path.read_bytes()
    with AppendLog(path, HEADER) as log:
        real = os.pwrite

        def fills_up(file, data, offset):
            if offset > len(before):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data[:5], offset)

        monkeypatch.setattr(os, "pwrite", fills_up)
        with pytest.raises(OSError, match=r"the disk is full: could not write to .* intact up to its 3 records"):
            log.append([{"id": 3}])
        assert path.read_bytes() == before
        monkeypatch.setattr(os, "pwrite", real)
        log.append([{"id": 3}])
    assert len(read_log(path)) == 5


def test_a_log_is_written_by_one_at_a_time(tmp_path):
    path = tmp_path / "log.jsonl"
    with AppendLog(path, HEADER) as log:
        log.append([{"id": 1}])
        before = path.read_bytes()
        with pytest.raises(LogInUse, match="being written by another process"):
            AppendLog(path, HEADER)
        with pytest.raises(LogInUse):
            AppendLog(path, {"job": "another"})
        assert path.read_bytes() == before
    with pytest.raises(LogMismatch):
        AppendLog(path, {"job": "another"})
    with AppendLog(path, HEADER) as log:  # an opening that failed holds nothing
        assert log.records == [{"id": 1}]


def test_a_forked_child_does_not_keep_the_log_locked(tmp_path):
    log = AppendLog(tmp_path / "log.jsonl", HEADER)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # it lives until the parent is through
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        log.close()
        AppendLog(tmp_path / "log.jsonl", HEADER).close()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "text", ["my notes\n", '{"name":"Bob"}\n', "notes without newline", '{"a":1}\n{"b":2}\nnotes\n', "[1, 2]\n", "\n"]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, text, force):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl is no log of this program"):
        AppendLog(path, HEADER, force=force)
    assert path.read_text() == text


@pytest.mark.parametrize("torn", ["", "{", '{"jo', '{"job":"x","settings":{"st', '{"job":"y"}\n'])
def test_a_header_torn_anywhere_is_begun_anew(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_text(torn)
    begin(path)
    assert len(read_log(path)) == 4


def test_a_log_that_is_only_read_may_be_compared_too(tmp_path):
    path = tmp_path / "log.jsonl"
    begin(path, count=0)
    assert len(read_log(path, {"job": "another"})) == 1  # there is nothing in it that could be mixed up
    begin(path)
    assert len(read_log(path, {**HEADER, "version": "2"}, ignore=["version"])) == 4
    with pytest.raises(LogMismatch, match=r"log\.jsonl is the log of another job; job was 'x' and is now 'another'"):
        read_log(path, {**HEADER, "job": "another"})
