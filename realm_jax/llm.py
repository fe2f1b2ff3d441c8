"""One model in this process: text, chat, logits, embeddings and perplexity."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from realm_jax.arguments import adapters_for, brief, is_batch, naming, params_for, refuse_options
from realm_jax.engine.core import Core, Progress
from realm_jax.engine.request import Request, collect
from realm_jax.engine.runner import Runner
from realm_jax.errors import ChatTemplateError, InvalidRequestError, RealmError
from realm_jax.lora import MergeReport, check_scale
from realm_jax.results import Piece, Result
from realm_jax.sampling_params import SamplingParams, shown
from realm_jax.text import ChatTemplate

Prompt = str | Sequence[int] | np.ndarray
_REQUEST_OPTIONS = "params, adapter, adapter_scale, speculate"
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
        mesh: str | None = None,
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        cache_bytes: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ):
        """Loads a model.

        Args:
          model: path of a GGUF file, folder of a checkpoint, name of a model in the registry, or Hugging Face
            repository id[:QUANT].
          context_length: most tokens that the prompt and output of a request may have together; None: what the model
            was trained on, at most 4096.
          max_batch: most requests that run at once (1 to 1024); more wait their turn.
          backend: kernels to use; "auto" takes the best there is.
          mesh: devices to spread the model over, such as "tensor=4,data=2": every matrix in so many parts (tensor), the
            experts of mixtures (expert), requests and their cache (data). "auto": all devices, as the model divides.
            What does not divide is whole on every device, and logged. None: one device. In a job of several processes
            (scripts/launch_sharded.py) process 0 makes the LLM, and the mesh is of all their devices.
          draft: "ngram" or a model with the same vocabulary, named as `model` is: requests then speculate unless they
            say otherwise, which changes how fast their tokens come and not which.
          adapters: LoRA adapters by name: GGUF files, PEFT folders or checkpoints, see `load_adapter`.
          cache_bytes: of the key/value cache, from one sequence of the whole context to max_batch of them; None: by the
            memory that is free, on a CPU at most 512 MiB in all. On a mesh what is given is of each device.
          progress: called as progress(what, bytes done, bytes in all or 0) while the model is fetched and loaded, and
            before a program is compiled.

        Raises:
          InvalidRequestError: an option is unknown, not supported in this version, or out of range; a draft's
            vocabulary is another one.
          AdapterError: an adapter is damaged, or made for another model.
          BackendError: the backend is not available here.
          ModelNotFoundError, DownloadError: there is no such model, or it could not be fetched.
          GGUFError, CheckpointError, UnsupportedModelError, TokenizerError: the file is damaged, or holds what is not
            supported.
        """
        refuse_options(options, "context_length, max_batch, backend, mesh, draft, adapters, cache_bytes, progress")
        self._core = Core(
            model,
            context_length=context_length,
            max_batch=max_batch,
            backend=backend,
            mesh=mesh,
            draft=draft,
            adapters=adapters,
            cache_bytes=cache_bytes,
            progress=progress,
        )
        self.path = self._core.path
        self.config = self._core.config
        self._loop = self._core.loop

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
        *,
        adapter: str | Sequence[str | None] | None = None,
        adapter_scale: float = 1.0,
        speculate: bool | int | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Completes one prompt, or several together.

        Args:
          prompts: a string or a list of token ids, or a list of such prompts.
          params: for all prompts, or a list with one for each; None: SamplingParams().
          adapter: name of a loaded adapter, or a list with one, or None, for each prompt; None: the model as it is.
          adapter_scale: times the scale that the adapter was loaded with.
          speculate: True or a number (that many at most): guess tokens with the draft that LLM was made with, or by
            n-gram lookup, and keep those that the model confirms; False: do not; None: as LLM was made.

        Returns:
          A Result for one prompt, a list of them in the same order for a list.

        Raises:
          InvalidRequestError: something is wrong with a prompt or its params; nothing has run then.
          AdapterError: an adapter is not loaded.
          CapacityError: a request needs more of the cache than there is.
          RealmError: the model's logits were not finite; the other prompts of the list are given up too.
        """
        refuse_options(options, _REQUEST_OPTIONS)
        self._check_open()
        batch = is_batch(prompts)
        listed: Sequence[Any] = prompts if batch else [prompts]  # type: ignore[assignment]
        each = params_for(params, len(listed), batch)
        names = adapters_for(adapter, len(listed), batch)
        groups = []
        for i, (prompt, wanted, name) in enumerate(zip(listed, each, names)):
            with naming(f"prompt {i}: " if batch else ""):
                tokens = self._core.tokens(prompt, "prompt")
                groups.append(self._requests(tokens, wanted, name, adapter_scale, speculate))
        results = self._run(groups)
        return results if batch else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        speculate: bool | int | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Completes one prompt piece by piece, as it is generated; the last piece has a finish_reason.

        Closing the iterator, or leaving it to be collected, cancels the request. Arguments and errors: see generate;
        params.n must be 1. What is wrong with the arguments is raised by this call, not by the first piece.
        """
        refuse_options(options, _REQUEST_OPTIONS)
        self._check_open()
        [wanted] = params_for(params, 1, batch=False)
        [name] = adapters_for(adapter, 1, batch=False)
        tokens = self._core.tokens(prompt, "prompt")
        return self._stream(self._requests(tokens, wanted, name, adapter_scale, speculate))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        template: str | None = None,
        **options: Any,
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        template: str | None = None,
        **options: Any,
    ) -> Iterator[Piece]: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        template: str | None = None,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        speculate: bool | int | None = None,
        **options: Any,
    ) -> Result | Iterator[Piece]:
        """The assistant's answer to a conversation.

        Args:
          messages: {"role": ..., "content": ...}, oldest first.
          params: see generate.
          stream: return an iterator of pieces, as `stream` does, instead of a Result.
          template: Jinja2 source of a chat template; None: the one in the model's file.
          adapter, adapter_scale, speculate: see generate.

        Raises:
          ChatTemplateError: the file has no template, or it cannot be used; see also generate.
        """
        refuse_options(options, f"{_REQUEST_OPTIONS}, stream, template")
        self._check_open()
        [wanted] = params_for(params, 1, batch=False)
        [name] = adapters_for(adapter, 1, batch=False)
        tokens = self._chat_tokens(messages, template)
        requests = self._requests(tokens, wanted, name, adapter_scale, speculate)
        return self._stream(requests) if stream else self._run([requests])[0]

    def logits(self, tokens: Sequence[int] | np.ndarray, adapter: str | None = None, **options: Any) -> np.ndarray:
        """float32 [T, vocab]: the model's logits after each of T token ids, with an adapter if one is named.

        Raises:
          InvalidRequestError: no tokens, an id outside the vocabulary, or more tokens than the context holds.
          AdapterError: the adapter is not loaded.
        """
        refuse_options(options, "tokens, adapter")
        runner = self._check_open()
        ids = self._fitting(self._core.checked_ids(tokens, "tokens"))
        [name] = adapters_for(adapter, 1, batch=False)

        def work(table: np.ndarray) -> np.ndarray:
            if name is None:
                return runner.step_all(ids, 0, table)
            return self._loop.adapters.with_placed(name, lambda placed: runner.step_all(ids, 0, table, placed))

        return self._loop.exclusively(len(ids), work)

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Loads a LoRA adapter, or replaces the one of that name; requests that run keep what they started with.

        Args:
          name: for `adapter=`.
          path: a GGUF adapter as llama.cpp's converter writes them, a PEFT folder, or an adapter's checkpoint.
          scale: of what it adds, beside its own alpha / rank.

        Raises:
          AdapterError: it is damaged, or made for another model. Everything is as before then.
        """
        self._check_open()
        self._loop.load_adapter(name, path, scale)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter's name away; requests that use it run to their end. AdapterError for an unknown one."""
        self._check_open()
        self._loop.unload_adapter(name)

    def merge_adapter(
        self, name: str, format: Literal["BF16", "Q8_0", "F32"] = "BF16", scale: float = 1.0
    ) -> MergeReport:
        """Merges a loaded adapter into the weights, for one who has the model to himself: no cost of its own from then
        on, and the adapted matrices take the bytes of their new format.

        Args:
          name: of the adapter; other adapters are applied beside the merged weights from now on.
          format: of the matrices that it changes: dense "BF16" or "F32", or "Q8_0".
          scale: times the scale that the adapter was loaded with.

        Returns:
          The weight error of each matrix, NMSE, and the bytes before and after.

        Raises:
          AdapterError: it is not loaded, or cannot be stored so.
          InvalidRequestError: requests run or wait.
        """
        return self._core.merge_adapter(name, format, check_scale(scale))

    def warm_up(self) -> None:
        """Compiles every program that requests may need; without it, the first that needs one waits for it."""
        self._core.warm_up()

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
                all_ids.append(self._fitting(self._core.tokens(text, "text")))
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
        return self._core.tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens as they are written; bytes that are no UTF-8 become U+FFFD.

        Raises:
          InvalidRequestError: an id outside the vocabulary.
        """
        self._check_open()
        return self._core.tokenizer.decode(self._core.checked_ids(tokens, "tokens", empty_ok=True).tolist())

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
            if self._core.tokenizer.add_bos and self._core.tokenizer.bos_id is not None:
                ids[0] = self._core.tokenizer.bos_id
            logits = self._loop.exclusively(len(ids), partial(runner.step_all, ids, 0))
            total += _negative_log_likelihood(logits[first:-1], chunk[first + 1 :])
        mean = total / (count * (context_length - first - 1))
        if not mean < _MAX_LOG:
            raise RealmError(f"the mean negative log-likelihood is {mean:g}; a perplexity is at most exp({_MAX_LOG})")
        return math.exp(mean)

    def close(self) -> None:
        """Cancels what runs and lets go of the weights. Any other use of the object afterwards is refused."""
        self._core.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> Runner:
        return self._core.check_open()

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

    def _stream(self, requests: list[Request]) -> Iterator[Piece]:
        if len(requests) != 1:
            raise InvalidRequestError(f"n is {len(requests)}; accepted: 1 when streaming")
        [request] = requests

        def pieces() -> Iterator[Piece]:
            try:
                self._loop.submit([request])
                yield from self._loop.pieces(request)
            finally:
                if not request.done:
                    self._loop.cancel([request])

        return pieces()

    def _requests(
        self,
        tokens: np.ndarray,
        params: SamplingParams,
        adapter: str | None,
        adapter_scale: float,
        speculate: bool | int | None,
    ) -> list[Request]:
        scale = check_scale(adapter_scale)
        if adapter is not None:
            self._loop.adapters.check(adapter)
        return self._core.requests(tokens, params, adapter=adapter, adapter_scale=scale, speculate=speculate)

    def _fitting(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) > self.context_length:
            raise InvalidRequestError(f"{len(ids)} tokens are given; the context holds {self.context_length} tokens")
        return ids

    def _chat_tokens(self, messages: Sequence[Mapping[str, Any]], source: str | None) -> np.ndarray:
        if source is None:
            if isinstance(self._core.template, ChatTemplateError):
                raise self._core.template
            text = self._core.template.render(messages)
        else:
            if not isinstance(source, str):
                raise InvalidRequestError(f"template is {brief(source)}; accepted: a string, or None")
            template = ChatTemplate(source, self._special_text("bos_id"), self._special_text("eos_id"))
            try:
                text = template.render(messages)
            finally:
                template.close()
        ids = self._core.tokenizer.encode(text, add_special=True, parse_special=True)
        # Templates that write BOS themselves are common; a model is trained on one of it.
        bos = self._core.tokenizer.bos_id
        if self._core.tokenizer.add_bos and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return self._core.checked_ids(ids, "conversation")

    def _special_text(self, name: Literal["bos_id", "eos_id"]) -> str:
        token = getattr(self._core.tokenizer, name)
        return "" if token is None else self._core.tokenizer.token_bytes(token).decode("utf-8", "replace")


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
