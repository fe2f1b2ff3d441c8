"""The process that renders chat templates: `python -I -S template_worker.py DIRECTORY...`.

Templates come with model files and are untrusted. The sandbox keeps them from Python's internals, but nothing inside a
process can interrupt one long operation of the interpreter (a string of 10**10 characters, a list doubled forty times
and printed), so they run here, where the parent can kill them and memory is limited. The directories hold jinja2 and
markupsafe; nothing else of Realm is imported, so that the process starts fast.

Frames on stdin and stdout: a little-endian uint32 length and that many bytes of JSON. The first frame says that the
process is ready. A request is {"source", "variables", "max_output"}, its answer {"text"} or {"error"}.
"""

import datetime
import json
import struct
import sys
from typing import IO, Any

MEMORY_LIMIT = 1 << 30  # bytes of address space
_CACHED_TEMPLATES = 16


def read_frame(stream: IO[bytes]) -> Any:
    """The next frame's value, None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Write one frame; UnicodeEncodeError for lone surrogates, TypeError or ValueError for what JSON cannot hold."""
    body = json.dumps(value, ensure_ascii=False).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


def limit_memory() -> None:
    """Bound the address space, where the system has such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):
        return  # no such limit here: the parent's time limit remains


def make_environment() -> Any:
    """The environment of Hugging Face's chat templates: its options, filters, functions and tags."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's text for training; here it is only a scope."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(template: Any, variables: dict[str, Any], max_output: int) -> dict[str, str]:
    """One answer: the text, or the error if it grows beyond max_output characters."""
    pieces = []
    size = 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > max_output:
            return {"error": f"the text is longer than {max_output} characters"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def main() -> None:
    sys.path += sys.argv[1:]
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    environment = make_environment()
    limit_memory()
    write_frame(answers, {"ready": True})
    templates: dict[str, Any] = {}
    while (request := read_frame(requests)) is not None:
        source = request["source"]
        try:
            if source not in templates:
                if len(templates) >= _CACHED_TEMPLATES:
                    templates.clear()
                templates[source] = environment.from_string(source)
            answer = render(templates[source], request["variables"], request["max_output"])
        except MemoryError:
            answer = {"error": f"it needs more than {MEMORY_LIMIT >> 20} MiB of memory"}
        except RecursionError:
            answer = {"error": "it is nested too deeply"}
        except Exception as error:  # whatever a template can raise is the template's error
            line = getattr(error, "lineno", None)
            answer = {"error": f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")}
        try:
            write_frame(answers, answer)
        except UnicodeEncodeError:
            write_frame(answers, {"error": "the text is not valid Unicode: it holds lone surrogates"})


if __name__ == "__main__":
    main()
