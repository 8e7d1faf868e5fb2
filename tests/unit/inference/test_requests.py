import json

import pytest

from megacogvx.errors import ConfigError
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.inference.requests import read_jobs

SETTINGS = SamplingSettings(num_steps=50, seed=3, guidance_scale=6.0)


def lines(tmp_path, *rows, name="prompts.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


def test_prompts_of_line_and_file(tmp_path):
    file = lines(tmp_path, "a dog", "", "   ", "  a cat  ", name="prompts.txt")
    jobs = read_jobs(["a bird"], file, SETTINGS, negative_prompt="rain")
    assert [job.prompt for job in jobs] == ["a bird", "a dog", "a cat"]
    assert [job.name for job in jobs] == ["sample-000", "sample-001", "sample-002"]
    assert [job.place for job in jobs] == [0, 1, 2], "equal prompts give other videos"
    assert {job.settings for job in jobs} == {SETTINGS} and {job.negative_prompt for job in jobs} == {"rain"}


def test_only_a_newline_ends_a_prompt(tmp_path):
    file = lines(tmp_path, json.dumps({"prompt": "a\u2028dog\x85"}, ensure_ascii=False))
    assert [job.prompt for job in read_jobs([], file, SETTINGS)] == ["a\u2028dog\x85"]


def test_a_line_may_say_more_than_its_prompt(tmp_path):
    file = lines(
        tmp_path,
        {"prompt": "a dog", "seed": 7, "image": "dog.png", "steps": 30, "guidance_scale": 4, "strength": 0.5},
        {"prompt": "a cat", "video": "/videos/cat.mp4", "negative_prompt": ""},
    )
    dog, cat = read_jobs([], file, SETTINGS, image=tmp_path / "all.png", negative_prompt="rain")
    assert (dog.settings.seed, dog.settings.num_steps) == (7, 30)
    assert (dog.settings.guidance_scale, dog.settings.strength) == (4.0, 0.5)
    assert (dog.image, dog.video, dog.negative_prompt) == (tmp_path / "dog.png", None, "rain")
    assert (str(cat.video), cat.image, cat.negative_prompt) == ("/videos/cat.mp4", tmp_path / "all.png", "")
    assert cat.settings == SETTINGS


def test_a_seed_of_its_own_gives_the_same_noise_on_any_line(tmp_path):
    rows = [{"prompt": "a bird"}, {"prompt": "a dog", "seed": 7}]
    assert [job.place for job in read_jobs([], lines(tmp_path, *rows), SETTINGS)] == [0, 0]
    assert [job.place for job in read_jobs([], lines(tmp_path, *rows[::-1]), SETTINGS)] == [0, 1]


def test_a_video_alone_is_a_request(tmp_path):
    (job,) = read_jobs([], None, SETTINGS, video=tmp_path / "a.mp4")
    assert (job.prompt, job.video) == ("", tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "sead": 1}, r"prompts.jsonl, line 1: unknown key sead; did you mean seed\?"),
        ({"prompt": "a", "steps": 0}, "line 1: steps=0"),
        ({"prompt": "a", "seed": "x"}, "line 1: seed='x'"),
        ("{", "line 1 is not JSON .* one object"),
        ('"a dog"', "line 1 must be an object .*, not a str"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        read_jobs([], lines(tmp_path, row), SETTINGS)


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no prompt"):
        read_jobs([], None, SETTINGS)
    with pytest.raises(ConfigError, match="can't be read"):
        read_jobs([], tmp_path / "none.txt", SETTINGS)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="can't be read"):
        read_jobs([], tmp_path / "latin.txt", SETTINGS)
