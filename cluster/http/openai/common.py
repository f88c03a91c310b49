"""What handlers of the family share."""

import contextlib
from collections.abc import Iterator

from ....proto.errors import InvalidRequest, NotFound
from ..call import Call
from ..errors import BadField, UnknownModel


def check_model(call: Call, name: str | None) -> None:
    """UnknownModel where the request names a model that is not here."""
    try:
        call.door.model.check_name(name or "")
    except NotFound as error:
        raise UnknownModel(str(error)) from None


def fingerprint_of(call: Call) -> str:
    """What the model's outputs depend on besides the request, as the API names it."""
    return f"isthmus-{call.door.model.fingerprint[:16]}"


@contextlib.contextmanager
def in_field(param: str) -> Iterator[None]:
    """Says which field an InvalidRequest of the block is about."""
    try:
        yield
    except BadField:
        raise
    except InvalidRequest as error:
        raise BadField(str(error), param) from None
