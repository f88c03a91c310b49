"""Names that callers choose: ids, tenants, labels."""

from .errors import InvalidRequest

MAX_NAME = 128  # characters of what a client may choose
MAX_CALL_NAME = 256  # of ids between gateway and workers, which add to the client's


def check_name(what: str, name: str, longest: int = MAX_NAME) -> str:
    """Returns a name; InvalidRequest where it is too long or has characters that cannot be printed.

    Those would spoil logs and tables, and PostgreSQL has no room for a NUL.
    """
    if len(name) > longest:
        raise InvalidRequest(f"{what} of {len(name)} characters; allowed: at most {longest}")
    if not name.isprintable():
        raise InvalidRequest(f"{what} has characters that cannot be printed; allowed: printable ones")
    return name
