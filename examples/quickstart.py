"""Ask a running biphase for an answer and print it as it comes:  python examples/quickstart.py [HOST:PORT]"""

import sys

from biphase.client import BiphaseError, Client

try:
    with Client(sys.argv[1] if len(sys.argv) > 1 else None) as client:
        question = [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]
        answer = client.generate(messages=question, max_tokens=96, temperature=0.0)
        for delta in answer:
            print(delta.text, end="", flush=True)
        print(f"\n[{' -> '.join(answer.result.instances)}, first token after {answer.result.ttft_ms:.0f} ms]")
except BiphaseError as error:
    sys.exit(f"quickstart: {error}")
