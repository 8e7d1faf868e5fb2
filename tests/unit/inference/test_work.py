import argparse
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from megacogvx.data.images import write_png
from megacogvx.data.video import write_video
from megacogvx.errors import EndpointError
from megacogvx.inference import options, work
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.inference.outputs import Outputs
from megacogvx.inference.plan import Plan
from megacogvx.inference.prompt_upsampler import PromptUpsampler
from megacogvx.inference.requests import Job
from megacogvx.inference.video_size import VideoSize
from megacogvx.models.vae.tiling import WHOLE

ALONE = SimpleNamespace(is_first=True, tensor=(0, 1), context=(0, 1), data=(0, 1))
FRAMES = torch.zeros(9, 32, 48, 3, dtype=torch.uint8)


class Writer:
    name = "writer"

    def __init__(self, ending=", written out", fails=False):
        self.asked, self.ending, self.fails = [], ending, fails

    def write(self, instruction, text, pictures=()):
        self.asked.append((text, [tuple(picture.shape) for picture in pictures]))
        if self.fails:
            raise EndpointError("writer is down")
        return text + self.ending


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(work, "broadcast_json", lambda value, _: value)


def plan(tmp_path, **changes):
    jobs = tuple(
        Job(f"sample-{number:03d}", number, prompt, SamplingSettings(num_steps=2))
        for number, prompt in enumerate(["a dog", "a cat", "a dog"])
    )
    found = SimpleNamespace(path="run", step=20, settings=SimpleNamespace(scaling_factor=0.7))
    made = Plan(jobs, VideoSize(9, 32, 48), 8.0, found, found, tmp_path / "t5", WHOLE, output=tmp_path / "out")
    return dataclasses.replace(made, **changes)


def look(plan, writer=None, loads=None):
    def load():
        (loads if loads is not None else []).append(1)
        return PromptUpsampler(writer)

    return work.list_work(plan, Outputs(plan.output), ALONE, torch.float32, load)


def test_prompts_are_written_out_once_each(tmp_path):
    writer, loads = Writer(), []
    found = look(plan(tmp_path), writer, loads)
    assert [item.text for item in found] == ["a dog, written out", "a cat, written out", "a dog, written out"]
    assert [text for text, _ in writer.asked] == ["a dog", "a cat"] and len(loads) == 1
    assert [item.facts["prompt"] for item in found] == ["a dog", "a cat", "a dog"]


def test_a_run_that_goes_on_has_the_texts_of_the_first(tmp_path, monkeypatch):
    """It was killed while it sampled: nothing is kept of the videos yet."""
    arguments = argparse.Namespace(output=tmp_path / "out", upsampler_folder=tmp_path, upsampler_failure="error")
    writers = [Writer(", one"), Writer(", two")]
    found = []
    for writer in writers:
        monkeypatch.setattr(options, "LocalModel", lambda *_, writer=writer: writer)
        made, outputs = plan(tmp_path), Outputs(tmp_path / "out")
        load = functools.partial(options.upsampler_of, arguments, torch.device("cpu"))
        found.append([item.text for item in work.list_work(made, outputs, ALONE, torch.float32, load)])
    assert found[0] == found[1] == ["a dog, one", "a cat, one", "a dog, one"]
    assert (len(writers[0].asked), writers[1].asked) == (2, [])


def test_without_a_language_model_prompts_are_unchanged_and_the_log_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(work.logger, "info", lambda text, *_: said.append(text))
    assert [item.text for item in look(plan(tmp_path))] == ["a dog", "a cat", "a dog"]
    assert "no language model is named: prompts go through unchanged" in said


def test_what_is_finished_or_sampled_is_not_written_out_again(tmp_path):
    made, outputs = plan(tmp_path), Outputs(tmp_path / "out")
    first, second, _ = look(made, Writer())
    outputs.write("sample-000", FRAMES, first.facts)
    outputs.keep_latents("sample-001", torch.zeros(3, 4, 4, 6), {**second.facts, "seconds": 2.0})
    writer = Writer()
    rest = look(made, writer)
    assert [(item.job.name, item.is_sampled) for item in rest] == [("sample-001", True), ("sample-002", False)]
    assert [item.text for item in rest] == ["a cat, written out", "a dog, written out"]
    assert [text for text, _ in writer.asked] == ["a dog"]
    assert rest[0].facts["seconds"] == 2.0
    for item in rest:
        outputs.write(item.job.name, FRAMES, item.facts)
    loads = []
    assert look(made, None, loads) == [] and not loads, "nothing to do: no language model is loaded"


def test_a_failure_of_the_first_rank_is_every_ranks(tmp_path, monkeypatch):
    with pytest.raises(EndpointError, match="writer is down"):
        look(plan(tmp_path), Writer(fails=True))
    told = {"error": "EndpointError", "text": "writer is down"}
    monkeypatch.setattr(work, "broadcast_json", lambda *_: told)
    other = SimpleNamespace(**{**vars(ALONE), "is_first": False})
    with pytest.raises(EndpointError, match="writer is down"):
        work.list_work(plan(tmp_path), Outputs(tmp_path), other, torch.float32, PromptUpsampler)


def test_images_and_videos_are_shown_at_the_size_that_is_made(tmp_path):
    write_png(tmp_path / "dog.png", torch.zeros(100, 90, 3, dtype=torch.uint8))
    write_video(tmp_path / "dog.mp4", torch.zeros(24, 64, 64, 3, dtype=torch.uint8), 8)
    made, writer = plan(tmp_path, video_use="caption"), Writer()
    job = made.jobs[0]
    for changes in ({"image": tmp_path / "dog.png"}, {"video": tmp_path / "dog.mp4"}):
        work.written_out(made, dataclasses.replace(job, **changes), PromptUpsampler(writer))
    assert writer.asked == [("a dog", [(32, 48, 3)]), ("a dog", [(32, 48, 3)] * 8)]


def test_another_image_of_the_same_name_is_another_video(tmp_path):
    image, made = tmp_path / "dog.png", plan(tmp_path)
    facts = []
    for level in (10, 200):
        write_png(image, torch.full((32, 48, 3), level, dtype=torch.uint8))
        facts.append(work.facts_of(made, dataclasses.replace(made.jobs[0], image=image), ALONE, torch.float32))
    assert facts[0]["image"] == facts[1]["image"] and facts[0]["image_xxh3"] != facts[1]["image_xxh3"]
