"""One loaded model with everything that runs requests on it: what LLM and Engine have in common."""

import os
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.arguments import brief, check_context_length, check_token_ids
from realm_jax.checkpoint import open_model
from realm_jax.engine.draft import DraftModel
from realm_jax.engine.follower import Leader
from realm_jax.engine.ledger import Ledger
from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import Request, choice_seed
from realm_jax.engine.runner import Runner, page_bytes
from realm_jax.engine.sampler import DrawRow, Sampler
from realm_jax.engine.speculation import DEFAULT_DRAFTS
from realm_jax.engine.speculator import Speculator
from realm_jax.engine.tenants import DEFAULT_TENANT, Tenant
from realm_jax.errors import ChatTemplateError, ClusterError, InvalidRequestError
from realm_jax.interrupt import interrupt_deferred
from realm_jax.lora import AdapterStore, MergeReport, merge
from realm_jax.model import Model, check_model, load_model
from realm_jax.model.backend import resolve_backend
from realm_jax.model.capacity import cache_budget
from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import auto_mesh, tensor_blocks
from realm_jax.model.tensors import TensorSpec
from realm_jax.registry import resolve
from realm_jax.sampling import MAX_DRAFTS
from realm_jax.sampling_params import SamplingParams, shown
from realm_jax.sharding.mesh import MeshShape
from realm_jax.text import ChatTemplate, load_chat_template, load_tokenizer

if TYPE_CHECKING:
    from realm_jax.structured import GrammarTokenizer

Progress = Callable[[str, int, int], None]

MAX_BATCH = 1024
MAX_QUEUE = 1 << 20


class Core:
    """A model, its tokenizer, and the loop that runs requests on it.

    Attributes:
      path: of the model's file. config: of the model.
      tokenizer, template: from the file; the template may be the error that it is.
      runner, loop: run batches, and requests.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        context_length: int | None = None,
        max_batch: int = 8,
        backend: Literal["auto", "xla", "native", "pallas"] = "auto",
        mesh: str | None = None,
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        tenants: Iterable[Tenant] = (),
        cache_bytes: int | None = None,
        queue_limit: int | None = None,
        ledger: str | Path | None = None,
        progress: Progress | None = None,
    ):
        """Loads a model; arguments and errors: see realm_jax.LLM and realm_jax.Engine."""
        _check_mesh(mesh)
        max_batch = _integer("max_batch", max_batch, 1, MAX_BATCH)
        if queue_limit is not None:
            queue_limit = _integer("queue_limit", queue_limit, 0, MAX_QUEUE)
        if cache_bytes is not None:
            cache_bytes = _integer("cache_bytes", cache_bytes, 1, 1 << 60)
        check_context_length(context_length)
        _check_adapters(adapters)
        if draft is not None and (not isinstance(draft, (str, Path)) or not str(draft)):
            raise InvalidRequestError(f'draft is {brief(draft)}; accepted: "ngram", a model as for `model`, or None')
        if progress is not None and not callable(progress):
            raise InvalidRequestError(f"progress is {brief(progress)}; accepted: a function, or None")
        kernels = resolve_backend(backend)
        if not isinstance(model, (str, Path)) or not str(model):
            raise InvalidRequestError(f"model is {brief(model)}; accepted: a path, a model's name or a repository id")
        with open_model(resolve(model, progress)) as file:
            self.path = Path(file.path)
            with interrupt_deferred():
                # Before the tokenizer, and both before the weights, which take long.
                checked = check_model(file, context_length)
                shape = _mesh_shape(mesh, max_batch, file, *checked)
                self.tokenizer = load_tokenizer(file)
            self._leader = _lead(shape, model, self.path, context_length=context_length, backend=kernels)
            # Also where what follows fails: the others would keep the model.
            self._let_go = weakref.finalize(self, _close, self._leader)
            self._let_go.atexit = False
            loaded = load_model(file, context_length, progress, backend=kernels, mesh=shape)
            self.template: ChatTemplate | ChatTemplateError
            try:
                self.template = load_chat_template(file)
            except ChatTemplateError as error:  # matters to chat() without a template of the caller's
                self.template = error
        self.config = loaded.config
        self._process = os.getpid()
        self._progress = progress
        self._grammars: GrammarTokenizer | None = None  # made when the first request needs it
        leader = self._leader
        if leader is not None:
            leader.wait()
        self._drafts = draft is not None
        small = None
        if draft is not None and str(draft) != "ngram":
            small = self._load_draft(draft, kernels, progress)
        budget = cache_budget() if cache_bytes is None else cache_bytes
        regions = 1
        if shape is not None:
            regions = shape.data
            if cache_bytes is None and jax.default_backend() == "cpu":  # whose devices share its memory
                budget //= jax.local_device_count()
        if small is not None:  # pages of both, as many of each; the draft's are all on one device
            budget = budget * page_bytes(loaded) // (page_bytes(loaded) + regions * page_bytes(small))
        runner = self._make_runner(loaded, max_batch, budget, leader=leader)
        store = AdapterStore(loaded, device_slots=max_batch, others=leader)
        for name, path in (adapters or {}).items():
            store.load(name, path)
        self.runner: Runner | None = runner
        self._draft = None
        if small is not None:
            their_runner = self._make_runner(small, max_batch, runner.num_pages * page_bytes(small), "the draft model ")
            self._draft = DraftModel(small, their_runner, vocab_size=self.config.vocab_size)
        self.speculator = Speculator(runner.buckets.row_bucket, runner.buckets.all_rows[-1], self._draft)
        self.loop = HostLoop(
            runner,
            tenants=tenants,
            queue_limit=queue_limit,
            adapters=store,
            speculator=self.speculator,
            ledger=None if ledger is None else Ledger(ledger),
        )

    @property
    def context_length(self) -> int:
        """Most tokens that the prompt and output of one request may have together."""
        return self.config.context_length

    def check_open(self) -> Runner:
        """The runner. InvalidRequestError in a closed core, or in another process than its own."""
        if self.runner is None:
            raise InvalidRequestError("the model was closed; load it again")
        if os.getpid() != self._process:  # JAX's threads do not come along: the first step would wait for ever
            raise InvalidRequestError("the model was loaded before a fork; load it in the process that uses it")
        return self.runner

    def close(self) -> None:
        """Cancels what runs and lets go of the weights. RealmError when the ledger cannot be written."""
        self.runner = None
        if os.getpid() != self._process:  # a fork has no part in what its parent runs and counts
            return
        try:
            self.loop.close()
        finally:
            self._let_go()
            if isinstance(self.template, ChatTemplate):
                self.template.close()

    def tokens(self, prompt: Any, what: str, parse_special: bool = True) -> np.ndarray:
        """int32 ids of a prompt, a string or a list of ids, checked."""
        if not isinstance(prompt, str):
            return self.checked_ids(prompt, what)
        if not prompt:
            raise InvalidRequestError(f"the {what} is empty; accepted: at least one character")
        ids = self.tokenizer.encode(prompt, add_special=True, parse_special=parse_special)
        return self.checked_ids(ids, what)

    def checked_ids(self, tokens: Any, what: str, empty_ok: bool = False) -> np.ndarray:
        return check_token_ids(tokens, what, self.config.vocab_size, empty_ok)

    def requests(
        self,
        tokens: np.ndarray,
        params: SamplingParams,
        *,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        speculate: bool | int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        cache: bool = True,
    ) -> list[Request]:
        """The params.n completions of a prompt, ready to be submitted. InvalidRequestError, CapacityError."""
        params.check_vocabulary(self.config.vocab_size)
        drafts = self._max_drafts(speculate)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        requests = []
        for choice in range(params.n):
            requests.append(
                Request(
                    tokens,
                    params,
                    seed=choice_seed(seed, choice),
                    tokenizer=self.tokenizer,
                    context_length=self.context_length,
                    tenant=tenant,
                    priority=priority,
                    deadline=deadline,
                    cache=cache,
                    adapter=adapter,
                    adapter_scale=adapter_scale,
                    speculation=self.speculator.start(drafts) if drafts else None,
                    grammar=self._grammar(params),
                )
            )
        self.loop.scheduler.check(requests[0].limit, tenant)
        return requests

    def merge_adapter(self, name: str, format: Any, scale: float) -> MergeReport:
        """See LLM.merge_adapter."""
        runner = self.check_open()
        if runner.model.mesh is not None:
            raise InvalidRequestError("merging is not supported on a mesh; accepted: a model on one device")

        def change() -> MergeReport:
            with self.loop.adapters.held(name) as adapter:
                model, report = merge(runner.model, adapter.adapter, format, adapter.effective(scale))
            runner.swap(model)
            return report

        return self.loop.swap_model(change)

    def warm_up(self) -> None:
        """Compiles what requests may need, so that none of them waits for it."""
        runner = self.check_open()
        self.loop.exclusively(1, lambda table: self._warm_up(runner))

    def _warm_up(self, runner: Runner) -> None:
        with self.loop.adapters.stacks() as stacks:
            runner.warm_up(stacks, verify=self._drafts)
        if self._draft is not None:
            self._draft.warm_up()
        sampler = Sampler(runner.max_batch, runner.vocab_size)
        anybody = next(iter(self.loop.scheduler.accounts))
        kinds = [
            SamplingParams(max_tokens=1),
            SamplingParams(max_tokens=1, temperature=1.0),
            SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9),
            SamplingParams(max_tokens=1, temperature=1.0, presence_penalty=1.0, logprobs=1),
        ]
        for params in kinds:
            [request] = self.requests(np.zeros(1, np.int32), params, tenant=anybody, speculate=False)
            request.slot = 0
            sampler.bind(request)
            for rows in runner.logit_rows(self._drafts):
                logits = jnp.zeros((rows, runner.vocab_size), jnp.float32)
                sampler.dispatch(logits, [DrawRow(request, 1)], count=True).collect()

    def _make_runner(
        self, model: Model, max_batch: int, cache_bytes: int, what: str = "", leader: Leader | None = None
    ) -> Runner:
        runner = Runner(model, max_batch=max_batch, cache_bytes=cache_bytes, leader=leader)
        if self._progress is not None:
            progress = self._progress
            runner.executor.on_compile = lambda shape: progress(f"compiling {what}for {shape}", 0, 0)
        return runner

    def _load_draft(self, draft: str | Path, backend: str, progress: Progress | None) -> Model:
        with open_model(resolve(draft, progress)) as file:
            with interrupt_deferred():
                config, _ = check_model(file, None)
                DraftModel.check_vocabulary(self.tokenizer, load_tokenizer(file))
            length = min(self.context_length, config.trained_context or self.context_length)
            return load_model(file, length, progress, backend=backend)

    def _max_drafts(self, speculate: bool | int | None) -> int:
        if speculate is None:
            speculate = self._drafts
        if isinstance(speculate, (bool, np.bool_)):
            return DEFAULT_DRAFTS if speculate else 0
        if not isinstance(speculate, (int, np.integer)) or not 0 <= speculate <= MAX_DRAFTS:
            raise InvalidRequestError(
                f"speculate is {shown(speculate)}; accepted: True, False, or an integer from 0 to {MAX_DRAFTS}"
            )
        return int(speculate)

    def _grammar(self, params: SamplingParams) -> Any:
        if params.grammar is None and params.json_schema is None:
            return None
        from realm_jax.structured import GrammarTokenizer

        if self._grammars is None:
            self._grammars = GrammarTokenizer(self.tokenizer, self.config.vocab_size)
        return self._grammars.start(params)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise InvalidRequestError(f"{name} is {shown(value)}; accepted: an integer from {low} to {high}")
    return int(value)


def _close(leader: Leader | None) -> None:
    if leader is not None:
        leader.close()


def _check_mesh(mesh: Any) -> None:
    if mesh is None or mesh == "auto":
        return
    if not isinstance(mesh, str):
        raise InvalidRequestError(f'mesh is {brief(mesh)}; accepted: a text such as "tensor=4,data=2", "auto", or None')
    MeshShape.parse(mesh)


def _mesh_shape(
    mesh: str | None, max_batch: int, file: Any, config: ModelConfig, specs: list[TensorSpec]
) -> MeshShape | None:
    """What the user's mesh means for a model; None: one device."""
    if mesh is None:
        return None
    if mesh == "auto":
        blocks, several = tensor_blocks(file.tensors, specs), jax.process_count() > 1
        shape = auto_mesh(config, specs, blocks, jax.device_count(), max_batch=max_batch, all_of_them=several)
    else:
        shape = MeshShape.parse(mesh)
    if max_batch % shape.data:
        raise InvalidRequestError(f"max_batch is {max_batch}; accepted on data={shape.data}: a multiple of it")
    return None if shape.devices == 1 else shape


def _lead(mesh: MeshShape | None, model: str | Path, path: Path, **options: Any) -> Leader | None:
    """In a job of several processes, process 0's end of it, where the others load the model by now; else None."""
    if mesh is None or jax.process_count() == 1:
        return None
    if jax.process_index():
        raise ClusterError(f"process {jax.process_index()} of the job makes a model on a mesh; only process 0 does")
    return Leader(model, path, mesh=str(mesh), **options)


def _check_adapters(adapters: Any) -> None:
    if adapters is None:
        return
    if not isinstance(adapters, Mapping) or not all(
        isinstance(name, str) and isinstance(path, (str, Path)) for name, path in adapters.items()
    ):
        raise InvalidRequestError(f"adapters is {brief(adapters)}; accepted: a dict of names and paths, or None")
