import dataclasses

import pytest
import torch

from megacogvx.errors import ConfigError
from megacogvx.inference.answers import Answers, Question, digest

ASKED = Question("writer", "image", 'a "dog"\n', ("0123",))


def test_an_answer_is_there_after_a_restart_for_its_own_question_alone(tmp_path):
    file = tmp_path / "out" / "texts.jsonl"
    answers = Answers(file)
    assert answers.get(ASKED) is None
    answers.keep(ASKED, "A brown dög\nruns.")
    answers.keep(Question("writer", "text", "a cat"), "A cat sleeps.")
    for known in (answers, Answers(file)):
        assert known.get(ASKED) == "A brown dög\nruns."
        for changes in ({"model": "seer"}, {"kind": "text"}, {"prompt": "a dog"}, {"pictures": ()}):
            assert known.get(dataclasses.replace(ASKED, **changes)) is None, changes


def test_a_line_that_was_cut_short_is_asked_again_and_harms_no_other(tmp_path):
    file = tmp_path / "texts.jsonl"
    other = Question("writer", "text", "a cat")
    Answers(file).keep(other, "A cat sleeps.")
    Answers(file).keep(ASKED, "A brown dog runs.")
    file.write_bytes(file.read_bytes()[:-20])
    answers = Answers(file)
    assert (answers.get(other), answers.get(ASKED)) == ("A cat sleeps.", None)
    answers.keep(ASKED, "A black dog runs.")
    assert (Answers(file).get(other), Answers(file).get(ASKED)) == ("A cat sleeps.", "A black dog runs.")


def test_other_lines_are_left_out(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('[]\n3\n{"text": "a"}\n{"model": "m", "kind": "text", "prompt": "p", "pictures": [], "text": 3}\n')
    assert Answers(file).get(Question("m", "text", "p")) is None


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    file.write_text("")
    monkeypatch.setattr(type(file), "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError("not yours")))
    with pytest.raises(ConfigError, match=r"texts.jsonl, which keeps written-out prompts, can't be read: not yours"):
        Answers(file)


def test_pictures_are_told_apart():
    picture = torch.arange(24, dtype=torch.uint8).reshape(2, 4, 3)
    other = picture.clone()
    other[1, 3, 2] += 1
    assert digest(picture) == digest(picture.clone())
    assert len({digest(picture), digest(other), digest(picture.reshape(4, 2, 3))}) == 3
