"""The OpenAI-compatible server: several clients at once, streams, and a server that was killed and started again."""

import base64
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from openai import OpenAI

from spatial_tokens.serving import serve_export
from tests.processes import free_port
from tests.serving.answers import LENGTH, by_transformers, picture
from tests.serving.bases import write, write_adapter

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
)
QUESTIONS = [
    (" What is this?", [picture(0)]),
    (" And this?", [picture(1, 96, 32)]),
    (" Compare them.", [picture(2, 40, 80), picture(0)]),
    ("There is no picture.", []),
]


def prompt(question):
    text, pictures = question
    return "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures) + text, pictures


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(question):
    """What a client sends."""
    text, pictures = question
    content = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    return {
        "model": "served",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        "temperature": 0,
        "max_tokens": LENGTH,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    write("qwen2_5_vl", folder)
    write_adapter("qwen2_5_vl", folder, "adapter")
    serve_export(folder / "base", folder / "adapter", folder / "served")
    (folder / "served" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextmanager
def server(model):
    """A server of its own process; it is killed at the end."""
    port = free_port()
    words = ["--model", model, "--served-model-name", "served", "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", 1024, "--max-num-seqs", 4]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            try:
                if httpx.get(f"{address}/health").is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the engine has a process of its own
        process.wait()


def answers(client):
    """Of all questions at once: tokens of the prompt, and of the answer."""
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        made = list(pool.map(lambda question: client.chat.completions.create(**asked(question)), QUESTIONS))
    return [(each.usage.prompt_tokens, each.choices[0].token_ids, each.choices[0].message.content) for each in made]


def test_clients(folder):
    expected = by_transformers(folder / "base", folder / "adapter", [prompt(each) for each in QUESTIONS])
    with server(folder / "served") as client:
        made = answers(client)
        assert [(prompt, tokens) for prompt, tokens, _ in made] == [(each.prompt, each.tokens) for each in expected]
        stream = client.chat.completions.create(**asked(QUESTIONS[0]), stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in stream if each.choices) == made[0][2]
    with server(folder / "served") as client:  # after it was killed
        assert answers(client) == made
