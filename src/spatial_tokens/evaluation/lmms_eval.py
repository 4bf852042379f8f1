"""lmms-eval's interface to a Hugging Face vision-language model with spatial tokens, or without them, to compare with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import GenerationConfig

from spatial_tokens.adapters.huggingface import load_adapter
from spatial_tokens.adapters.huggingface.prompts import as_prompt
from spatial_tokens.adapters.huggingface.ready import from_hub
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.pictures import read_picture

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
ANSWER = 1024  # tokens, where a task does not say
IMAGE = "<image>"  # where a picture is in the text of many data sets, whatever a model's own token is
Messages = list[dict[str, Any]]


@contextmanager
def _last_line() -> Iterator[None]:
    """Ends the command with an error's one line and status 1: lmms-eval would print its own traceback, and end with status 0."""
    try:
        yield
    except SpatialTokensError as error:
        sys.exit(f"lmms-eval: spatial_tokens: {error}")


class SpatialTokens(lmms):  # type: ignore[misc]
    """`--model spatial_tokens --model_args pretrained=BASE,adapter=DIR`.

    Args:
        pretrained: A model of the hub, or a folder; any that `attach` takes.
        adapter: What `save_adapter` or `push_to_hub` wrote, a folder or "user/name"; None for the base alone.
        device: Where to run; a GPU unless there is none. With several processes (`accelerate launch`), each has its own.
        dtype: The base's; what its files have unless given.
        device_map: For a base that one device does not hold; "auto" spreads it.
        attn_implementation: As transformers takes it.
        batch_size: Requests at once; of those with `n` images each, `batch_size // n`.
        max_batch_size: Of the harness; not used.

    Raises:
        SpatialTokensError: If base or adapter cannot be loaded or do not fit each other.
    """

    is_simple = False  # it is given chat messages

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise SpatialTokensError(f"batch_size must be a positive integer, got {shown(batch_size)}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()  # the harness gathers the processes' results with it
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        one = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"device_map": device_map, "attn_implementation": attn_implementation}
        model, processor = from_hub(
            str(pretrained), dtype=dtype, **{name: each for name, each in options.items() if each is not None}
        )
        if device_map is None:
            model = model.to(self.accelerator.device if self._world_size > 1 else torch.device(one))
        processor.tokenizer.padding_side = "left"
        if adapter is not None:
            model, processor = load_adapter(model, str(adapter), processor)
            model.spatial_tokens.to(model.dtype)
        self._model, self.processor, self.device = model.eval(), processor, model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> SpatialTokens:
        """As the harness makes one from its command line. What is wrong then, or in its run, is the command's last line."""
        known = list(inspect.signature(cls).parameters)
        with _last_line():
            try:
                given = simple_parse_args_string(arg_string)
            except ValueError as error:
                raise SpatialTokensError(f"model_args must be NAME=VALUE,NAME=VALUE, got {shown(arg_string)}") from error
            if unknown := [name for name in given if name not in known]:
                raise SpatialTokensError(f"no model_args {', '.join(unknown)}; there are {', '.join(known)}")
            if "pretrained" not in given:
                raise SpatialTokensError("model_args must name the model: pretrained=BASE")
            made: SpatialTokens = super().create_from_arg_string(arg_string, additional_config)
        for asked in ("generate_until", "loglikelihood", "generate_until_multi_round"):
            setattr(made, asked, _last_line()(getattr(made, asked)))
        return made

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def messages_of(self, arguments: tuple[Any, ...]) -> Messages:
        """The messages of a request whose answer is generated."""
        _, to_messages, _, doc_id, task, split = arguments
        return to_messages(self.task_dict[task][split][doc_id])  # type: ignore[no-any-return]

    @staticmethod
    def options_of(arguments: tuple[Any, ...]) -> dict[str, Any]:
        """How the answer to a request is generated."""
        return arguments[2]  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests.

        Raises:
            SpatialTokensError: If no request of a task has an image, or one has a video or sound.
        """
        arguments = [request.args for request in requests]
        self._require_images(arguments)
        answers: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="spatial_tokens") as bar:
            for batch in self._batches(arguments):
                options = self.options_of(arguments[batch[0]])
                for number, (text, tokens) in zip(batch, self._generate([arguments[i] for i in batch], options), strict=True):
                    answers[number] = GenerationResult(text, TokenCounts(output_tokens=tokens))
                    self.cache_hook.add_partial("generate_until", (arguments[number][0], options), text)
                bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval asks this of models that are given strings."""
        raise SpatialTokensError("lmms-eval gives tasks of likelihoods to models of strings alone: add --force_simple")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise SpatialTokensError("spatial_tokens answers in one round; leave out tasks of several")

    def _batches(self, arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[int]]:
        """Numbers of requests that go together: generated in the same way, alike in length."""

        def key(number: int) -> str:
            return repr(sorted(self.options_of(arguments[number]).items()))

        order = sorted(range(len(arguments)), key=lambda number: (key(number), -len(arguments[number][0])))
        for _, group in groupby(order, key):
            numbers = list(group)
            yield from (numbers[at : at + self.batch_size] for at in range(0, len(numbers), self.batch_size))

    def _require_images(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        for *start, _, task, split in {each[-2]: each for each in arguments}.values():
            documents = range(len(self.task_dict[task][split]))  # all, as a process has requests of some
            if not any(self._images(self.messages_of((*start, number, task, split))) for number in documents):
                raise SpatialTokensError(f"task {task!r} has no images, and spatial tokens are made of images; leave it out")

    def _generate(self, batch: Sequence[tuple[Any, ...]], asked: dict[str, Any]) -> list[tuple[str, int]]:
        """Each request's answer and its number of tokens; those with as many images as each other together."""
        messages = [self.messages_of(each) for each in batch]
        images = [self._images(each) for each in messages]
        answers: dict[int, tuple[str, int]] = {}
        for count in sorted(set(map(len, images))):
            rows = [row for row, each in enumerate(images) if len(each) == count]
            size = max(1, self.batch_size // max(1, count))
            for part in (rows[at : at + size] for at in range(0, len(rows), size)):
                inputs = self._inputs([messages[row] for row in part], [images[row] for row in part])
                answers.update(zip(part, self._answers(inputs, asked), strict=True))
        return [answers[row] for row in range(len(batch))]

    def _answers(self, inputs: Any, asked: dict[str, Any]) -> list[tuple[str, int]]:
        with torch.inference_mode():
            made = self._model.generate(**inputs, **self._generation_options(asked))
        if not self._model.config.is_encoder_decoder:
            made = made[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(made, skip_special_tokens=True)
        lengths = [int((row != self._pad).sum()) for row in made]
        return [(_until(text, asked.get("until") or ()), length) for text, length in zip(texts, lengths, strict=True)]

    def _generation_options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What of a task's options `generate` knows; sampling at a temperature above 0 alone."""
        defaults = GenerationConfig()  # type: ignore[no-untyped-call]
        known = {name: each for name, each in asked.items() if hasattr(defaults, name) and each is not None}
        sampled = bool(asked.get("temperature")) and asked.get("do_sample", True)
        if not sampled:
            known = {name: each for name, each in known.items() if name not in SAMPLING}
        return {"max_new_tokens": ANSWER, "pad_token_id": self._pad, **known, "do_sample": sampled}

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.eot_token_id if pad is None else pad)

    def _inputs(self, messages: Sequence[Messages], images: Sequence[list[Any]], continuation: str = "") -> Any:
        placed = [_placed(ChatMessages(messages=each).to_hf_messages()) for each in messages]
        texts = [as_prompt(self.processor, each) + continuation for each in placed]
        inputs = self.processor(text=texts, images=images if any(images) else None, padding=True, return_tensors="pt")
        return inputs.to(self._model.device, self._model.dtype)

    @staticmethod
    def _images(messages: Messages) -> list[Any]:
        """The images of a conversation, in RGB.

        Raises:
            SpatialTokensError: If it has a video or sound, or an image's file cannot be read.
        """
        images, videos, sounds = ChatMessages(messages=messages).extract_media()
        if videos or sounds:
            raise SpatialTokensError(
                f"a task has {'videos' if videos else 'sound'}, and spatial tokens are made of images; leave it out"
            )
        return [read_picture(each, extra="hf") if isinstance(each, str) else each.convert("RGB") for each in images]


class SpatialTokensOnStrings(SpatialTokens):
    """The same for `--force_simple`, where the harness has tasks of likelihoods: it is given a string and images."""

    is_simple = True

    def messages_of(self, arguments: tuple[Any, ...]) -> Messages:
        """The string and the images of a request, as one message."""
        context, _, to_images, doc_id, task, split = arguments
        images = to_images(self.task_dict[task][split][doc_id]) if to_images is not None else None
        parts = [{"type": "image", "url": each} for each in images or []]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]

    @staticmethod
    def options_of(arguments: tuple[Any, ...]) -> dict[str, Any]:
        """How the answer to a request is generated."""
        return arguments[1]  # type: ignore[no-any-return]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mean loss of each continuation, as lmms-eval compares them, and whether it is what would be generated greedily."""
        arguments = [request.args for request in requests]
        self._require_images(arguments)
        return [self._loss(each) for each in tqdm(arguments, disable=self.rank != 0, desc="spatial_tokens")]

    @torch.inference_mode()
    def _loss(self, arguments: tuple[Any, ...]) -> tuple[float, bool]:
        _, continuation, _, doc_id, task, split = arguments
        words = continuation if isinstance(continuation, str) else continuation(self.task_dict[task][split][doc_id])
        messages = self.messages_of(arguments)
        images = self._images(messages)
        start = self._inputs([messages], [images])["input_ids"].shape[1]
        inputs = self._inputs([messages], [images], words)
        said = inputs["input_ids"][0, start:]
        logits = self._model(**inputs).logits[0, start - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, said).item(), bool((logits.argmax(-1) == said).all())


def _placed(messages: Messages) -> Messages:
    """Each message's images where its text says `<image>`, if it does so for each; otherwise before the text, without that word."""
    placed = []
    for message in messages:
        images = iter([part for part in message["content"] if part["type"] == "image"])
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        content = [
            {**part, "text": part["text"].replace(IMAGE, "")} if part["type"] == "text" else part for part in message["content"]
        ]
        if sum(text.count(IMAGE) for text in texts) == len(content) - len(texts):
            content = []
            for text in texts:
                first, *others = text.split(IMAGE)
                content.append({"type": "text", "text": first})
                for each in others:
                    content += [next(images), {"type": "text", "text": each}]
        placed.append({**message, "content": [part for part in content if part.get("text") != ""]})
    return placed


def _until(text: str, stops: Sequence[str] | str) -> str:
    """A text up to the first of some strings."""
    for stop in (stops,) if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
