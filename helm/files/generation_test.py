"""Asks the gateway, and ends with 0 once an answer came whose KV moved between workers."""

import json
import secrets
import subprocess
import sys

TRIES = 5
COMMAND = ["isthmus", "generate", "-", "--json", "--max-tokens", "16", "--temperature", "0", "--timeout", "120"]

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
        sys.exit(0)
sys.exit("no KV moved between workers: is a prefill worker ready? (isthmus status, isthmus explain)")
