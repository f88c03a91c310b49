"""`POST /tokenize` and `/detokenize`."""

import asyncio
from typing import Any

from starlette.responses import Response

from ....proto.generation_pb2 import GenerateRequest
from ...requests.request import validate
from ..call import Call
from ..common.checks import check_model
from ..door import Endpoint
from ..errors import BadField
from .conversation import chat_of
from .logprobs import token_text
from .schema.requests import DetokenizeRequest, TokenizeRequest
from .schema.responses import Detokenized, Tokenized


async def tokenize(call: Call) -> Response:
    """The tokens of a text or a conversation, as a request with it would have them."""
    body = await call.body(TokenizeRequest)
    check_model(call, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise BadField("allowed: prompt or messages, one of them", "prompt")
    request = GenerateRequest(model=body.model or "")
    if body.prompt is not None:
        request.prompt = body.prompt
    else:
        request.chat.CopyFrom(chat_of(body))
        request.continue_final_message = bool(body.continue_final_message)
    model = call.door.model
    async with call.alive():
        tokens = (await validate(request, model)).prompt_token_ids
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": model.context_length, "tokens": tokens}
    if body.return_token_strs:
        found["token_strs"] = [token_text(model.tokenizer, token) for token in tokens]
    return call.json(found)


async def detokenize(call: Call) -> Response:
    """The text of tokens."""
    body = await call.body(DetokenizeRequest)
    check_model(call, body.model)
    model = call.door.model
    bad = next((token for token in body.tokens if token >= model.vocab_size), None)
    if bad is not None:
        raise BadField(f"tokens has token id {bad}; allowed: 0 to {model.vocab_size - 1}", "tokens")

    def text() -> str:
        decoder = model.new_decoder()
        return decoder.push(body.tokens) + decoder.finish()

    return call.json({"prompt": await asyncio.to_thread(text)})


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/tokenize",
        summary="Tokenizes a text or a conversation.",
        handle=tokenize,
        request=TokenizeRequest,
        response=Tokenized,
        errors=(404,),
    ),
    Endpoint(
        method="POST",
        path="/detokenize",
        summary="The text of tokens.",
        handle=detokenize,
        request=DetokenizeRequest,
        response=Detokenized,
        errors=(404,),
    ),
)
