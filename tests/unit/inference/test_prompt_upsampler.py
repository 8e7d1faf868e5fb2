"""Against a small local server that answers, or fails, as language models' endpoints do."""

import base64
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from megacogvx.errors import ConfigError, EndpointError
from megacogvx.inference import prompt_upsampler
from megacogvx.inference.answers import Answers
from megacogvx.inference.language_models import KEY_VARIABLE, PICTURE_SIDE, Endpoint
from megacogvx.inference.prompt_upsampler import PromptUpsampler


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """Answers each request with the next of `answers`: (status, body), or a function of the handler."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if callable(answer):
                    answer(self)
                    return
                status, body = answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def endpoint(self, **settings):
        return Endpoint(self.url, "writer", **{"timeout": 5.0, "pause": 0.0, **settings})


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(prompt_upsampler.logger, "handle", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(prompt_upsampler.logger, "isEnabledFor", lambda level: level >= logging.INFO)
    return lines


def test_a_prompt_is_written_out_once(serve, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server = serve((200, completion(' "A brown dog runs." \n')))
    upsampler = PromptUpsampler(server.endpoint())
    assert [upsampler.text("a dog"), upsampler.text("a dog")] == ["A brown dog runs."] * 2
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    system, user = body["messages"]
    assert (body["model"], system["role"], user) == ("writer", "system", {"role": "user", "content": "a dog"})
    assert system["content"] == prompt_upsampler.INSTRUCTIONS["text"]


def test_another_run_has_the_same_text_and_asks_nobody(serve, tmp_path):
    picture = torch.full((8, 8, 3), 90, dtype=torch.uint8)
    server = serve((200, completion("A dog.")), (200, completion("A red dog.")), (200, completion("Another.")))

    def texts():
        upsampler = PromptUpsampler(server.endpoint(vision_model="seer"), answers=Answers(tmp_path / "texts.jsonl"))
        return [upsampler.text("a dog"), upsampler.image("a dog", picture), upsampler.text("a dog")]

    assert texts() == texts() == ["A dog.", "A red dog.", "A dog."]
    assert len(server.requests) == 2
    other = PromptUpsampler(server.endpoint(), answers=Answers(tmp_path / "texts.jsonl"))
    assert other.image("a dog", picture) == "Another."  # the model that was asked is another one
    assert other.writer.name != server.endpoint(vision_model="seer").name


def test_a_prompt_that_went_on_unchanged_is_asked_again(serve, tmp_path):
    server = serve((500, b""), (200, completion("A dog.")))
    upsampler = PromptUpsampler(server.endpoint(retries=0), "unchanged", Answers(tmp_path / "texts.jsonl"))
    assert [upsampler.text("a dog"), upsampler.text("a dog")] == ["a dog", "A dog."]


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "somebody else's")
    server = serve((200, completion("A dog.")))
    PromptUpsampler(server.endpoint()).text("a dog")
    assert "Authorization" not in server.requests[0][1]


def test_pictures_go_to_the_vision_model(serve):
    server = serve((200, completion("A red square moves.")))
    upsampler = PromptUpsampler(server.endpoint(vision_model="seer"))
    red = torch.tensor([200, 10, 10], dtype=torch.uint8).expand(900, 1800, 3)
    assert upsampler.image("it moves", red) == "A red square moves."
    assert upsampler.video("", [red, red]) == "A red square moves."
    first, second = (body["messages"] for _, _, body in server.requests)
    assert [body["model"] for _, _, body in server.requests] == ["seer", "seer"]
    assert [m[0]["content"] for m in (first, second)] == [prompt_upsampler.INSTRUCTIONS[k] for k in ("image", "video")]
    text, picture = first[1]["content"]
    assert text == {"type": "text", "text": "it moves"}
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (PICTURE_SIDE, PICTURE_SIDE // 2)
    assert max(abs(a - b) for a, b in zip(shown.getpixel((5, 5)), (200, 10, 10), strict=True)) < 8
    assert len(second[1]["content"]) == 3


def test_what_may_pass_is_asked_again(serve):
    server = serve((503, b"busy"), (429, b"wait"), (200, completion("A dog.")))
    assert PromptUpsampler(server.endpoint(retries=2)).text("a dog") == "A dog."
    server = serve((503, b"busy"))
    with pytest.raises(EndpointError, match=r"writer at http.*HTTP 503 .*busy, after 2 attempts; start the endpoint"):
        PromptUpsampler(server.endpoint(retries=1)).text("a dog")
    assert len(server.requests) == 2


def test_a_refusal_is_not_asked_again(serve):
    server = serve((401, b"no such key"))
    with pytest.raises(EndpointError, match=r"refuses: HTTP 401 .*no such key"):
        PromptUpsampler(server.endpoint(retries=2)).text("a dog")
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed(serve):
    """Else the key would go to an address that nobody named."""
    other = serve((200, completion("A dog.")))

    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", other.url)
        handler.end_headers()

    with pytest.raises(EndpointError, match="refuses: HTTP 302"):
        PromptUpsampler(serve(redirect).endpoint()).text("a dog")
    assert not other.requests


@pytest.mark.parametrize("drips", [False, True])
def test_the_time_limit_holds_for_the_whole_answer(serve, drips):
    """A server that sends a byte now and then never lets a read time out."""
    over = threading.Event()

    def slowly(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40 if drips else 0):  # two seconds in all
            try:
                handler.wfile.write(b" ")
            except OSError:
                return
            over.wait(0.05)
        over.wait(0 if drips else 2)

    server = serve(slowly)
    with pytest.raises(EndpointError, match=r"no whole answer within 0\.3 s, after 1 attempts"):
        PromptUpsampler(server.endpoint(timeout=0.3, retries=0)).text("a dog")
    over.set()


def test_an_endpoint_that_is_down_is_named(serve):
    server = serve((200, b""))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(EndpointError, match=r"writer at http://127.*can't be reached: .*refused"):
        PromptUpsampler(server.endpoint(retries=1)).text("a dog")


@pytest.mark.parametrize("answer", [b"<html>", b'{"choices": []}', b"[]", completion(None), completion("  ")])
def test_an_answer_of_another_kind_is_named(serve, answer):
    with pytest.raises(EndpointError, match=r"doesn't answer with chat|in place of a text|answered nothing"):
        PromptUpsampler(serve((200, answer)).endpoint()).text("a dog")


def test_an_answer_without_end_is_cut(serve):
    with pytest.raises(EndpointError, match="more than 1048576 bytes"):
        PromptUpsampler(serve((200, b"x" * (2 << 20))).endpoint()).text("a dog")


def test_a_failure_may_let_the_prompt_go_on_unchanged(serve, said):
    upsampler = PromptUpsampler(serve((500, b"")).endpoint(retries=0), on_failure="unchanged")
    assert upsampler.text("a dog") == "a dog"
    assert any("'a dog' goes on unchanged" in line and "HTTP 500" in line for line in said)
    with pytest.raises(EndpointError):
        upsampler.video("", [torch.zeros(8, 8, 3, dtype=torch.uint8)])  # nothing to go on with


def test_without_a_model_prompts_are_unchanged():
    upsampler = PromptUpsampler()
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    assert (upsampler.text("a dog"), upsampler.image("a dog", picture)) == ("a dog", "a dog")
    assert upsampler.video("a dog", [picture]) == "a dog"
    with pytest.raises(ConfigError, match="only be described by a vision model"):
        upsampler.video("", [picture])
