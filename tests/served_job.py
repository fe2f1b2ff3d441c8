"""What process 0 of a job runs in tests/test_processes.py, or one process alone: requests, and their tokens as JSON.

python served_job.py '{"model": ..., "mesh": ..., "adapters": {...}, "draft": ..., "options": {...}}'
"""

import json
import sys

from realm_jax import LLM, SamplingParams

PROMPTS = ["the cat", "a b c a b c a b c a b", "one two three four five six seven eight nine ten", "x"] * 3
WHICH = ["a", None, "b"] * 4


def main(wanted: dict) -> None:
    params = [
        SamplingParams(max_tokens=24, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    found = {}
    with LLM(wanted["model"], mesh=wanted["mesh"], draft=wanted["draft"], **wanted["options"]) as llm:
        if wanted["draft"] == "ngram":  # in short
            llm.load_adapter("a", wanted["adapters"]["a"])
            mixed = llm.generate(PROMPTS[:4], params[:4], adapter=["a", None, "a", None], speculate=3)
            print(json.dumps({"mixed": [out.tokens for out in mixed]}), flush=True)
            return
        found["plain"] = [out.tokens for out in llm.generate(PROMPTS, params, speculate=False)]
        found["drafts"] = [out.tokens for out in llm.generate(PROMPTS, params, speculate=3)]
        for name, path in wanted["adapters"].items():
            llm.load_adapter(name, path)
        found["adapters"] = [out.tokens for out in llm.generate(PROMPTS, params, adapter=WHICH)]
        llm.unload_adapter("a")
        found["again"] = [out.tokens for out in llm.generate(PROMPTS[:2], params[:2], adapter=["b", None])]
        found["drafted"] = llm._core.loop.stats().drafted
        print("ready", flush=True)
        if wanted.get("endless"):
            while True:
                llm.generate(PROMPTS, params)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
