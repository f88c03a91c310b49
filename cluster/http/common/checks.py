"""What handlers of several families check."""

import contextlib
from collections.abc import Iterator

from ....proto.common_pb2 import SamplingParams
from ....proto.errors import InvalidRequest, NotFound
from ....proto.generation_pb2 import Chat
from ...text.answer_parser import ToolChoice
from ..call import Call
from ..errors import BadField, UnknownModel


def check_model(call: Call, name: str | None) -> None:
    """UnknownModel where the request names a model that is not here."""
    try:
        call.door.model.check_name(name or "")
    except NotFound as error:
        raise UnknownModel(str(error)) from None


@contextlib.contextmanager
def in_field(param: str) -> Iterator[None]:
    """Says which field an InvalidRequest of the block is about."""
    try:
        yield
    except BadField:
        raise
    except InvalidRequest as error:
        raise BadField(str(error), param) from None


def require_call(call: Call, sampling: SamplingParams, chat: Chat, choice: ToolChoice, *, parallel: bool) -> None:
    """Makes the output a call of a tool, where one is required; BadField where it cannot be one. `parallel`: it may be
    several."""
    with in_field("tools" if choice.mode == "auto" else "tool_choice"):
        grammar = call.door.model.tool_grammar(chat.tools, choice, parallel=parallel)
    if grammar is None:
        return
    if sampling.HasField("grammar"):
        raise BadField("tool_choice and another field both say what the output must be", "tool_choice")
    sampling.grammar.CopyFrom(grammar)
    call.name_fields(grammar="tool_choice")
