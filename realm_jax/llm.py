"""One model in this process: text, chat, logits, embeddings and perplexity."""

import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from realm_jax.arguments import (
    brief,
    check_context_length,
    check_token_ids,
    is_batch,
    naming,
    params_for,
    refuse_options,
    refuse_request_options,
)
from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import Request, choice_seed, collect
from realm_jax.engine.runner import Runner
from realm_jax.errors import ChatTemplateError, InvalidRequestError, RealmError
from realm_jax.gguf import open_gguf
from realm_jax.interrupt import interrupt_deferred
from realm_jax.model import check_model, load_model
from realm_jax.model.backend import resolve_backend
from realm_jax.registry import resolve
from realm_jax.results import Piece, Result
from realm_jax.sampling_params import SamplingParams, shown
from realm_jax.text import ChatTemplate, load_chat_template, load_tokenizer

Prompt = str | Sequence[int] | np.ndarray
Progress = Callable[[str, int, int], None]

MAX_BATCH = 1024
_MAX_LOG = 709  # exp of more is no float


class LLM:
    """A loaded model. Its methods may be called from several threads; requests of all of them share one batch.

    Also a context manager that closes it. Prompts given as strings are tokenized with the special tokens that the model
    puts around a text (such as BOS), and special tokens written in the string are recognised.
    """

    def __init__(
        self,
        model: str | Path,
        context_length: int | None = None,
        max_batch: int = 8,
        backend: Literal["auto", "xla", "native", "pallas"] = "auto",
        *,
        progress: Progress | None = None,
        **options: Any,
    ):
        """Loads a model.

        Args:
          model: path of a GGUF file, name of a model in the registry, or Hugging Face repository id[:QUANT].
          context_length: most tokens that the prompt and output of a request may have together; None: what the model
            was trained on, at most 4096.
          max_batch: most requests that run at once (1 to 1024); more wait their turn.
          backend: kernels to use; "auto" takes the best there is.
          progress: called as progress(what, bytes done, bytes in all or 0) while the model is fetched and loaded, and
            before a program is compiled.
          options: none in this version: mesh, draft and adapters are refused unless None.

        Raises:
          InvalidRequestError: an option is unknown, not supported in this version, or out of range.
          BackendError: the backend is not available here.
          ModelNotFoundError, DownloadError: there is no such model, or it could not be fetched.
          GGUFError, UnsupportedModelError, TokenizerError: the file is damaged, or holds what is not supported.
        """
        refuse_options(
            options, later=("mesh", "draft", "adapters"), known="context_length, max_batch, backend, progress"
        )
        if (
            isinstance(max_batch, bool)
            or not isinstance(max_batch, (int, np.integer))
            or not 1 <= max_batch <= MAX_BATCH
        ):
            raise InvalidRequestError(f"max_batch is {shown(max_batch)}; accepted: an integer from 1 to {MAX_BATCH}")
        check_context_length(context_length)
        kernels = resolve_backend(backend)
        if not isinstance(model, (str, Path)) or not str(model):
            raise InvalidRequestError(f"model is {brief(model)}; accepted: a path, a model's name or a repository id")
        with open_gguf(resolve(model, progress)) as file:
            self.path = Path(file.path)
            with interrupt_deferred():
                check_model(file, context_length)  # before the tokenizer, and both before the weights, which take long
                self._tokenizer = load_tokenizer(file)
            loaded = load_model(file, context_length, progress, backend=kernels)
            self._template: ChatTemplate | ChatTemplateError
            try:
                self._template = load_chat_template(file)
            except ChatTemplateError as error:  # matters to chat() without a template of the caller's
                self._template = error
        self.config = loaded.config
        runner = Runner(loaded, max_batch=int(max_batch))
        if progress is not None:
            runner.on_compile = lambda what: progress(f"compiling for {what}", 0, 0)
        self._runner: Runner | None = runner
        self._process = os.getpid()
        self._loop = HostLoop(runner)

    @property
    def context_length(self) -> int:
        """Most tokens that the prompt and output of one request may have together."""
        return self.config.context_length

    @overload
    def generate(
        self, prompts: str | list[int] | np.ndarray, params: SamplingParams | None = None, **options: Any
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]] | list[np.ndarray],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Completes one prompt, or several together.

        Args:
          prompts: a string or a list of token ids, or a list of such prompts.
          params: for all prompts, or a list with one for each; None: SamplingParams().
          options: none in this version: adapter and speculate are refused unless None (speculate: or False).

        Returns:
          A Result for one prompt, a list of them in the same order for a list.

        Raises:
          InvalidRequestError: something is wrong with a prompt or its params; nothing has run then.
          CapacityError: a request needs more of the cache than there is.
          RealmError: the model's logits were not finite; the other prompts of the list are given up too.
        """
        refuse_request_options(options)
        self._check_open()
        batch = is_batch(prompts)
        listed: Sequence[Any] = prompts if batch else [prompts]  # type: ignore[assignment]
        each = params_for(params, len(listed), batch)
        groups = []
        for i, (prompt, wanted) in enumerate(zip(listed, each)):
            with naming(f"prompt {i}: " if batch else ""):
                groups.append(self._requests(self._tokens(prompt, "prompt"), wanted))
        results = self._run(groups)
        return results if batch else results[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Piece]:
        """Completes one prompt piece by piece, as it is generated; the last piece has a finish_reason.

        Closing the iterator, or leaving it to be collected, cancels the request. Arguments and errors: see generate;
        params.n must be 1. What is wrong with the arguments is raised by this call, not by the first piece.
        """
        refuse_request_options(options)
        self._check_open()
        [wanted] = params_for(params, 1, batch=False)
        return self._stream(self._tokens(prompt, "prompt"), wanted)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        template: str | None = None,
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        template: str | None = None,
    ) -> Iterator[Piece]: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        template: str | None = None,
        **options: Any,
    ) -> Result | Iterator[Piece]:
        """The assistant's answer to a conversation.

        Args:
          messages: {"role": ..., "content": ...}, oldest first.
          params: see generate.
          stream: return an iterator of pieces, as `stream` does, instead of a Result.
          template: Jinja2 source of a chat template; None: the one in the model's file.

        Raises:
          ChatTemplateError: the file has no template, or it cannot be used; see also generate.
        """
        refuse_request_options(options)
        self._check_open()
        [wanted] = params_for(params, 1, batch=False)
        tokens = self._chat_tokens(messages, template)
        return self._stream(tokens, wanted) if stream else self._run([self._requests(tokens, wanted)])[0]

    def logits(self, tokens: Sequence[int] | np.ndarray, **options: Any) -> np.ndarray:
        """float32 [T, vocab]: the model's logits after each of T token ids.

        Raises:
          InvalidRequestError: no tokens, an id outside the vocabulary, or more tokens than the context holds.
        """
        refuse_options(options, later=("adapter",), known="tokens")
        runner = self._check_open()
        ids = self._fitting(self._checked_ids(tokens, "tokens"))
        return self._loop.exclusively(len(ids), partial(runner.step_all, ids, 0))

    def embed(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 [N, dim]: one vector of unit length for each text (one row for a single string).

        Pooled from the last layer's normalised hidden states as the file says (first or last token), else their mean.

        Raises:
          InvalidRequestError: an empty text, a lone surrogate, or more tokens than the context holds.
        """
        runner = self._check_open()
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(text, str) for text in listed):
            raise InvalidRequestError(f"texts is {brief(texts)}; accepted: a string or a non-empty list of strings")
        all_ids = []
        for i, text in enumerate(listed):
            with naming(f"text {i}: "):
                all_ids.append(self._fitting(self._tokens(text, "text")))
        vectors = np.empty((len(listed), self.config.hidden_size), np.float32)
        for i, ids in enumerate(all_ids):
            states = self._loop.exclusively(len(ids), partial(runner.hidden_all, ids, 0))
            pooled = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[self.config.pooling]
            vectors[i] = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
        return vectors

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          add_special: with the special tokens that the model puts around a text, such as BOS.
          parse_special: recognise special tokens written in the text.

        Raises:
          InvalidRequestError: not a string, or a lone surrogate in it.
        """
        self._check_open()
        if not isinstance(text, str):
            raise InvalidRequestError(f"text is {brief(text)}; accepted: a string")
        return self._tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens as they are written; bytes that are no UTF-8 become U+FFFD.

        Raises:
          InvalidRequestError: an id outside the vocabulary.
        """
        self._check_open()
        return self._tokenizer.decode(self._checked_ids(tokens, "tokens", empty_ok=True).tolist())

    def perplexity(self, text: str, context_length: int = 512) -> float:
        """exp of the mean negative log-likelihood of a text's tokens, as llama.cpp's perplexity tool defines it.

        The tokens are cut into chunks of context_length that do not overlap; what is left at the end is not scored.
        Where the model has a BOS token, it takes the place of each chunk's first token. Of each chunk the tokens after
        the first half, which have at least that much context, are scored.

        Raises:
          InvalidRequestError: the text has fewer tokens than one chunk, or the chunk does not fit the context.
          RealmError: the model's logits are not finite, or give a likelihood beyond all floats.
        """
        runner = self._check_open()
        if (
            isinstance(context_length, bool)
            or not isinstance(context_length, (int, np.integer))
            or not 4 <= context_length <= self.context_length
        ):
            raise InvalidRequestError(
                f"context_length is {shown(context_length)}; accepted: an integer from 4 to {self.context_length}"
            )
        tokens = np.asarray(self.tokenize(text), np.int32)
        count = len(tokens) // context_length
        if count == 0:
            raise InvalidRequestError(
                f"the text has {len(tokens)} tokens; accepted: at least {context_length}, one chunk of context_length"
            )
        first = context_length // 2
        total = 0.0
        for chunk in tokens[: count * context_length].reshape(count, context_length):
            ids = chunk.copy()
            if self._tokenizer.add_bos and self._tokenizer.bos_id is not None:
                ids[0] = self._tokenizer.bos_id
            logits = self._loop.exclusively(len(ids), partial(runner.step_all, ids, 0))
            total += _negative_log_likelihood(logits[first:-1], chunk[first + 1 :])
        mean = total / (count * (context_length - first - 1))
        if not mean < _MAX_LOG:
            raise RealmError(f"the mean negative log-likelihood is {mean:g}; a perplexity is at most exp({_MAX_LOG})")
        return math.exp(mean)

    def close(self) -> None:
        """Cancels what runs and lets go of the weights. Any other use of the object afterwards is refused."""
        self._loop.close()
        if isinstance(self._template, ChatTemplate):
            self._template.close()
        self._runner = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> Runner:
        if self._runner is None:
            raise InvalidRequestError("the model was closed; load it again")
        if os.getpid() != self._process:  # JAX's threads do not come along: the first step would wait for ever
            raise InvalidRequestError("the model was loaded before a fork; load it in the process that uses it")
        return self._runner

    def _run(self, groups: list[list[Request]]) -> list[Result]:
        """Runs all requests together; one result per group, which holds the n choices of one prompt."""
        requests = [request for group in groups for request in group]
        try:
            self._loop.submit(requests)
            results = [[collect(self._loop.pieces(request)) for request in group] for group in groups]
        finally:
            if not all(request.done for request in requests):
                self._loop.cancel(requests)
        return [_with_choices(group) for group in results]

    def _stream(self, tokens: np.ndarray, params: SamplingParams) -> Iterator[Piece]:
        if params.n != 1:
            raise InvalidRequestError(f"n is {params.n}; accepted: 1 when streaming")
        [request] = self._requests(tokens, params)

        def pieces() -> Iterator[Piece]:
            try:
                self._loop.submit([request])
                yield from self._loop.pieces(request)
            finally:
                if not request.done:
                    self._loop.cancel([request])

        return pieces()

    def _requests(self, tokens: np.ndarray, params: SamplingParams) -> list[Request]:
        params.check_vocabulary(self.config.vocab_size)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        requests = [
            Request(
                tokens,
                params,
                seed=choice_seed(seed, choice),
                tokenizer=self._tokenizer,
                context_length=self.context_length,
            )
            for choice in range(params.n)
        ]
        self._loop.scheduler.check(requests[0].limit)
        return requests

    def _tokens(self, prompt: Any, what: str) -> np.ndarray:
        """int32 ids of a prompt, checked."""
        if not isinstance(prompt, str):
            return self._checked_ids(prompt, what)
        if not prompt:
            raise InvalidRequestError(f"the {what} is empty; accepted: at least one character")
        ids = self._tokenizer.encode(prompt, add_special=True, parse_special=True)
        return self._checked_ids(ids, what)

    def _checked_ids(self, tokens: Any, what: str, empty_ok: bool = False) -> np.ndarray:
        return check_token_ids(tokens, what, self.config.vocab_size, empty_ok)

    def _fitting(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) > self.context_length:
            raise InvalidRequestError(f"{len(ids)} tokens are given; the context holds {self.context_length} tokens")
        return ids

    def _chat_tokens(self, messages: Sequence[Mapping[str, Any]], source: str | None) -> np.ndarray:
        if source is None:
            if isinstance(self._template, ChatTemplateError):
                raise self._template
            text = self._template.render(messages)
        else:
            if not isinstance(source, str):
                raise InvalidRequestError(f"template is {brief(source)}; accepted: a string, or None")
            template = ChatTemplate(source, self._special_text("bos_id"), self._special_text("eos_id"))
            try:
                text = template.render(messages)
            finally:
                template.close()
        ids = self._tokenizer.encode(text, add_special=True, parse_special=True)
        # Templates that write BOS themselves are common; a model is trained on one of it.
        bos = self._tokenizer.bos_id
        if self._tokenizer.add_bos and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return self._checked_ids(ids, "conversation")

    def _special_text(self, name: Literal["bos_id", "eos_id"]) -> str:
        token = getattr(self._tokenizer, name)
        return "" if token is None else self._tokenizer.token_bytes(token).decode("utf-8", "replace")


def _with_choices(group: list[Result]) -> Result:
    if len(group) == 1:
        return group[0]
    first = group[0]
    return Result(
        first.text, first.tokens, first.finish_reason, first.logprobs, first.usage, first.timing, choices=group
    )


def _negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over T of -log softmax(logits [T, vocab])[target], in float64 row by row: no copy of the whole."""
    total = 0.0
    for row, target in zip(logits, targets):
        best = row.max()
        total += math.log(np.sum(np.exp(row - best), dtype=np.float64)) + float(best) - float(row[target])
    return total
