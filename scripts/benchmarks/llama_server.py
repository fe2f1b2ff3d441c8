"""llama.cpp's own server, as bench_serving asks it: xllamacpp runs it in this process, and requests go over HTTP."""

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .engines import answer_questions, pin

SLOT_TOKENS = 512  # of prompt and output, at most


class LlamaServer:
    """A server of a model with so many slots."""

    def __init__(self, path: Path, threads: int, slots: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = SLOT_TOKENS * slots, slots
        params.n_gpu_layers = params.verbosity = params.port = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        begun = time.perf_counter()
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address
        self.facts = {
            "load_seconds": time.perf_counter() - begun,
            "xllamacpp": xllamacpp.__version__,
            "built_for": xllamacpp.get_system_info().strip(),
        }

    def trace(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Seconds from sending all requests (token ids, how many to generate) at once to the last answer."""
        with ThreadPoolExecutor(len(requests)) as pool:
            begun = time.perf_counter()
            answers = list(pool.map(self._complete, requests))
            seconds = time.perf_counter() - begun
        for (_, count), answer in zip(requests, answers):
            if answer["tokens_predicted"] != count:
                raise RuntimeError(f"it generated {answer['tokens_predicted']} tokens, not {count}")
        return {"seconds": seconds}

    def _complete(self, request: tuple[list[int], int]) -> dict[str, Any]:
        prompt, count = request
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        posted = urllib.request.Request(
            f"{self._address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(posted, timeout=3600) as reply:
            return json.load(reply)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    pin(arguments.threads)
    answer_questions(lambda: LlamaServer(arguments.path, arguments.threads, arguments.slots))


if __name__ == "__main__":
    main()
