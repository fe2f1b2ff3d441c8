"""A runner and a tokenizer without a model: logits are a hash of the tokens found through the page tables.

The fake runner keeps tokens in pages as the real one keeps keys and values. A wrong table, a page shared by two
sequences, a wrong start or an uncomputed token therefore changes the hash, and with it every later token.
"""

import hashlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.engine.buckets import PREFILL_TOKENS, Buckets
from realm_jax.engine.request import Request
from realm_jax.errors import AdapterError
from realm_jax.sampling_params import SamplingParams

VOCAB = 300
BOS, EOS, SPECIAL = 256, 257, 258
PAGE, CHUNK = 4, 16
EMPTY = -9


ADAPTED = 1000  # times an adapter's content, added to the tokens it touches, as it would change keys and values


class FakeAdapters:
    """Stands in for lora.AdapterStore: an adapter's content is a number. `stacks` are the contents of the slots."""

    shared = False

    def __init__(self, slots=4):
        self.named, self.unnamed, self.slots = {}, set(), [0] * slots

    @property
    def names(self):
        return sorted(self.named)

    @property
    def stacks(self):
        return {"slots": np.array(self.slots)}

    def read(self, path):
        return path

    def add(self, name, content, scale):
        self._drop(name)
        self.named[name] = FakeResident(content)

    def unload(self, name):
        self.get(name)
        self._drop(name)

    def get(self, name):
        if name not in self.named:
            raise AdapterError(f"there is no adapter {name!r}")
        return self.named[name]

    def acquire(self, name):
        resident = self.get(name)
        resident.holders += 1
        return resident

    def release(self, resident):
        resident.holders -= 1
        assert resident.holders >= 0
        if not resident.holders:
            self.unnamed.discard(resident)

    def place(self, rows):
        wanted = {row[0].content for row in rows if row is not None}
        assert len(wanted) <= len(self.slots)
        for content in wanted - set(self.slots):
            free = next(i for i, held in enumerate(self.slots) if held not in wanted)
            self.slots[free] = content
        return np.array([-1 if row is None else self.slots.index(row[0].content) for row in rows], np.int32)

    def _drop(self, name):
        old = self.named.pop(name, None)
        if old is not None and old.holders:
            self.unnamed.add(old)


class FakeResident:
    def __init__(self, content):
        self.content, self.holders = content, 0

    def cache_key(self, scale=1.0):
        return f"{self.content}/{scale}".encode()


def fake_logits(tokens) -> np.ndarray:
    """float32 [VOCAB] that depend on every one of the tokens; lower-case letters are likely, EOS is not."""
    digest = hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCAB).astype(np.float32)
    logits[97:123] += 4
    logits[EOS] = -20
    return logits


class FakeRunner:
    """Stands in for engine.runner.Runner. `before_step`, if set, is called with each step's rows."""

    def __init__(self, max_batch=4, num_pages=64, max_pages_per_slot=16, chunk=CHUNK, regions=1):
        self.max_batch = max_batch
        self.chunk = chunk
        self.page_size = PAGE
        self.num_pages = num_pages
        self.regions = regions
        self.max_pages_per_slot = max_pages_per_slot
        self.vocab_size = VOCAB
        self.buckets = replace(Buckets.up_to(max_batch), tokens=(1, 4, chunk))
        self.pool = np.full((num_pages, PAGE), EMPTY, np.int32)
        self.steps: list[list[tuple[int, int]]] = []  # per step, (start, tokens) of each row
        self.overrides: dict[bytes, np.ndarray] = {}  # logits after exactly these tokens
        self.before_step = None

    def sequence(self, table, length):
        pages = table[: -(-length // PAGE)]
        return self.pool[pages].reshape(-1)[:length]

    @property
    def compiled(self):
        return 0

    def reset(self):
        self.pool[:] = EMPTY

    def parts(self, tokens, starts, tables, **options):
        logits = self.step(tokens, starts, tables, **options)
        # The ends of prompts and the rows that decode come apart, as they do from the device.
        apart = [[i for i, row in enumerate(tokens) if (len(row) == 1) == one] for one in (False, True)]
        return [(rows, self.padded(logits[np.array(rows)])) for rows in apart if rows]

    def padded(self, logits):
        missing = self.buckets.row_bucket(len(logits)) - len(logits)
        return jnp.pad(logits, ((0, missing), (0, 0)), constant_values=np.nan)

    def step(self, tokens, starts, tables, *, source=None, last_tokens=None, stacks=None, slots=None) -> jax.Array:
        if self.before_step is not None:
            self.before_step(tokens, starts)
        assert 1 <= len(tokens) <= self.buckets.all_rows[-1]
        assert tables.shape == (len(tokens), self.max_pages_per_slot)
        assert tables.dtype == np.int32
        self.steps.append([(start, len(row)) for row, start in zip(tokens, starts)])
        tokens = [np.array(row) for row in tokens]
        if source is not None:
            for row, at in zip(tokens, source):
                if at >= 0:
                    assert len(row) == 1
                    row[0] = np.asarray(last_tokens)[at]
        contents = [0 if slot < 0 else stacks["slots"][slot] for slot in slots_of(slots, tokens)]
        for row, start, table, content in zip(tokens, starts, tables, contents):
            assert 1 <= len(row) <= PREFILL_TOKENS
            assert len(row) == 1 or start % PAGE == 0  # rows of several tokens begin where texts are cut
            row += ADAPTED * content
            for i, token in enumerate(row):
                at = start + i
                self.pool[table[at // PAGE], at % PAGE] = token
        out = np.full((self.buckets.row_bucket(len(tokens)), VOCAB), np.nan, np.float32)  # padding must not matter
        for i, (row, start, table) in enumerate(zip(tokens, starts, tables)):
            known = self.sequence(table, start + len(row))
            out[i] = self.overrides.get(known.astype(np.int32).tobytes(), fake_logits(known))
        return jnp.asarray(out)


def slots_of(slots, tokens):
    return [-1] * len(tokens) if slots is None else slots


class FakeTokenizer:
    """Bytes are tokens 0 .. 255; then BOS, EOS and a control token."""

    add_space_prefix = False
    eog_ids = frozenset({EOS})
    vocab_size = VOCAB

    def is_special(self, token):
        return token in (BOS, EOS, SPECIAL)

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b"?"


def make_request(prompt, context_length=64, seed=0, max_tokens=20, options=None, **params) -> Request:
    """options: of Request, such as tenant."""
    params["max_tokens"] = max_tokens
    ids = (
        np.frombuffer(prompt, np.uint8).astype(np.int32) if isinstance(prompt, bytes) else np.asarray(prompt, np.int32)
    )
    sampling = SamplingParams(**params)
    return Request(
        ids, sampling, seed=seed, tokenizer=FakeTokenizer(), context_length=context_length, **(options or {})
    )


def expected_greedy(prompt: bytes, count: int, content: int = 0) -> list[int]:
    """What greedy decoding gives, with an adapter of some content, computed without an engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(fake_logits(np.array(tokens) + ADAPTED * content).argmax()))
    return tokens[len(prompt) :]
