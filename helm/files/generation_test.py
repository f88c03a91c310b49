"""Asks the gateway until an answer came whose KV moved between workers; then over HTTP for its models, where an
argument is the address of that port. Ends with 0 where both were answered."""

import json
import os
import secrets
import ssl
import subprocess
import sys
import urllib.request

TRIES = 5
COMMAND = ["isthmus", "generate", "-", "--json", "--max-tokens", "16", "--temperature", "0", "--timeout", "120"]


def models_over_http(url: str) -> list[str]:
    """Their names, asked for with the certificate and the key of the environment. OSError where nobody answers, or with
    a refusal."""
    context = None
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=os.environ["ISTHMUS_CA"])
        if "ISTHMUS_CERT" in os.environ:
            context.load_cert_chain(os.environ["ISTHMUS_CERT"], os.environ["ISTHMUS_KEY"])
    request = urllib.request.Request(f"{url}/v1/models")
    if key := os.environ.get("ISTHMUS_API_KEY"):
        request.add_header("authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=30, context=context) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def generate() -> None:
    """Returns once an answer came whose KV moved."""
    for number in range(1, TRIES + 1):
        # Nobody has these words in a cache.
        prompt = f"Count the words of this list: {' '.join(secrets.token_hex(3) for _ in range(150 * number))}"
        done = subprocess.run(COMMAND, input=prompt, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"isthmus generate ended with {done.returncode}: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        transfer = answer["timings"].get("transfer", {})
        moved = int(transfer.get("kv_bytes_wire", 0))
        print(f"try {number}: {answer['usage']}, {answer['finish_reason']}, KV on the wire: {moved} bytes")
        if moved and answer["token_ids"]:
            return
    sys.exit("no KV moved between workers: is a prefill worker ready? (isthmus status, isthmus explain)")


if __name__ == "__main__":
    generate()
    for url in sys.argv[1:]:
        try:
            print(f"models at {url}: {', '.join(models_over_http(url))}")
        except OSError as error:
            sys.exit(f"no models at {url}: {error}")
