"""Run by another interpreter, one that has vLLM's CPU build: the peer's side of bench/engine.py.

Reads JSON lines from stdin, ``{"requests", "input_len", "output_len"}``, and answers each with ``{"seconds"}``.

    PYTHON bench/vllm_driver.py HF_MODEL_DIR THREADS
"""

import json
import os
import random
import sys
import time


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints is not an answer
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype="float32", max_model_len=2048, enforce_eager=True, skip_tokenizer_init=True)
    rng = random.Random(0)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            {"prompt_token_ids": [rng.randrange(100, 40000) for _ in range(asked["input_len"])]}
            for _ in range(asked["requests"])
        ]
        params = SamplingParams(temperature=0, max_tokens=asked["output_len"], ignore_eos=True, detokenize=False)
        start_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - start_s}), file=answers, flush=True)


if __name__ == "__main__":
    main()
