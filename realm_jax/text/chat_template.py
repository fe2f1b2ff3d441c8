"""Chat templates: from a list of messages to the prompt a model was trained on."""

import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ChatTemplateError, InvalidRequestError
from . import template_worker
from .tokenizer import metadata_of
from .worker_process import WorkerProcess

MAX_SOURCE = 1 << 20
MAX_OUTPUT = 1 << 24
TIME_LIMIT = 5.0
_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A Jinja2 chat template as Hugging Face's `apply_chat_template` runs it, with bounds on time, memory and size.

    source: the template. bos, eos: the texts of those tokens, "" where there are none. time_limit: seconds for one
    rendering; max_output: characters of its result. Rendering happens in a process of its own that starts with the
    first one and is kept for the next; `close` ends it, as does the end of the object or of the program. Safe to use
    from several threads. Raises ChatTemplateError for a source that is empty or too long."""

    def __init__(
        self, source: str, bos: str = "", eos: str = "", *, time_limit: float = TIME_LIMIT, max_output: int = MAX_OUTPUT
    ):
        if not isinstance(source, str) or not source.strip():
            raise ChatTemplateError("the chat template is empty")
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"the chat template has {len(source)} characters; {MAX_SOURCE} are the most")
        self.source = source
        self.bos = bos
        self.eos = eos
        self.time_limit = time_limit
        self.max_output = max_output
        self._lock = threading.Lock()
        self._worker = WorkerProcess(
            template_worker.__file__,
            ("jinja2", "markupsafe"),
            serves="chat templates",
            does="renders chat templates",
            error=ChatTemplateError,
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for a conversation.

        messages: {"role": str, "content": str or a list of parts}, oldest first. add_generation_prompt: end with the
        beginning of the assistant's turn. tools: JSON schemas of functions. extra: further variables of the template,
        of JSON's types. Raises InvalidRequestError for messages or variables of another form, ChatTemplateError for a
        template that is malformed, unsafe, too slow or too large, or that refuses the messages."""
        check_messages(messages)
        variables = {
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": bool(add_generation_prompt),
            "bos_token": self.bos,
            "eos_token": self.eos,
            **extra,
        }
        with self._lock:
            answer = self._ask({"source": self.source, "variables": variables, "max_output": self.max_output})
        if "error" in answer:
            raise ChatTemplateError(f"the chat template failed: {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """End the rendering process; the next rendering starts another."""
        self._worker.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            answer, expired = self._worker.ask(request, self.time_limit)
        except UnicodeEncodeError:
            raise InvalidRequestError("messages or template variables hold a lone surrogate") from None
        except (TypeError, ValueError, RecursionError, struct.error) as error:
            raise InvalidRequestError(f"messages or template variables are not of JSON's types: {error}") from None
        if answer is None:
            return {"error": f"it took longer than {self.time_limit:g} s" if expired else "its process died"}
        return answer


def check_messages(messages: Any) -> None:
    """InvalidRequestError unless messages is a conversation of {"role", "content"} mappings.

    An assistant's message may hold tool_calls and no content."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(f"messages: {type(messages).__name__} is not a list of role and content dicts")
    if not messages:
        raise InvalidRequestError("messages is empty; at least one message is needed")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{i}]: {type(message).__name__} is not a dict with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise InvalidRequestError(f"messages[{i}].role: {role!r} is not a role such as 'user'")
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
        if isinstance(content, str) or parts or (content is None and message.get("tool_calls")):
            continue
        raise InvalidRequestError(f"messages[{i}].content: {type(content).__name__} is not text or a list of parts")


def load_chat_template(source: Any, name: str | None = None) -> ChatTemplate:
    """The chat template of an open GGUFFile or a metadata mapping.

    name: one of the file's named templates (such as "tool_use"), None for the default one. Raises ChatTemplateError if
    the file has none of that name."""
    metadata = metadata_of(source)
    key = _KEY if name is None else f"{_KEY}.{name}"
    template = metadata.get(key)
    if template is None:
        others = sorted(other for other in metadata if other.startswith(_KEY + "."))
        offered = f"; it has {', '.join(others)}" if others else ""
        raise ChatTemplateError(
            f"the file has no {key}{offered}: pass a template, such as LLM.chat(messages, template=...)"
        )
    if not isinstance(template, str):
        raise ChatTemplateError(f"{key}: {type(template).__name__} is not a string")
    return ChatTemplate(template, _token_text(metadata, "bos_token_id"), _token_text(metadata, "eos_token_id"))


def _token_text(metadata: Mapping[str, Any], key: str) -> str:
    tokens, id = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(tokens, (list, tuple)) or not isinstance(id, int) or not 0 <= id < len(tokens):
        return ""
    return tokens[id]
