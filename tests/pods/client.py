"""A client in a pod of its own: `python client.py REQUESTS.json`.

It prints one line of JSON when every answer has begun, and one when all have ended, with each answer's token ids.

Plain gRPC: the gateway's CA, an API key, nothing else. Where and with what comes from the environment, as the command
line of isthmus has it: ISTHMUS_SERVER, ISTHMUS_CA, ISTHMUS_API_KEY.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import grpc.aio

from isthmus.cluster.client.client import build_request
from isthmus.proto.generation_pb2 import GenerateEvent
from isthmus.proto.generation_pb2_grpc import GenerationStub

BEGUN = 5  # tokens, of every answer
TIMEOUT_S = 120


async def main(wanted: list[dict[str, Any]]) -> None:
    """`wanted` has the arguments of `build_request`. All are sent at once."""
    credentials = grpc.ssl_channel_credentials(Path(os.environ["ISTHMUS_CA"]).read_bytes())
    answers: list[dict[str, Any]] = [{"token_ids": [], "finished": False, "replays": 0, "error": ""} for _ in wanted]
    async with grpc.aio.secure_channel(os.environ["ISTHMUS_SERVER"], credentials) as channel:
        stub = GenerationStub(channel)
        running = [
            asyncio.create_task(answer(stub, request, into)) for request, into in zip(wanted, answers, strict=True)
        ]
        while not all(into["error"] or len(into["token_ids"]) >= BEGUN for into in answers):
            await asyncio.sleep(0.01)
        print(json.dumps({"begun": len(answers)}), flush=True)
        await asyncio.gather(*running)
    print(json.dumps({"answers": answers}), flush=True)


async def answer(stub: GenerationStub, request: dict[str, Any], into: dict[str, Any]) -> None:
    metadata = [("authorization", f"Bearer {os.environ['ISTHMUS_API_KEY']}")]
    call = stub.Generate(build_request(**request), metadata=metadata, timeout=TIMEOUT_S)
    try:
        while isinstance(event := await call.read(), GenerateEvent):
            assert event.index == len(into["token_ids"]) or not event.token_ids, "a token is lost or came twice"
            into["token_ids"] += event.token_ids
            if event.finish_reason:
                into["finished"], into["replays"] = True, event.timings.replays
                into["decode_worker"] = event.timings.decode_worker
    except grpc.aio.AioRpcError as error:
        into["error"] = f"{error.code().name}: {error.details()}"


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
