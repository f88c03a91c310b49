"""API keys: what they look like, and what is kept of them.

    isthmus_0123456789abcdef_SECRET        id (64 bits, hex), secret (256 bits, base64url: 43 characters)

The id finds the record, the secret proves the key. What is kept is HMAC-SHA-256 of the secret under a salt of the key's
own. A slow hash (scrypt, Argon2) makes guessing of passwords expensive; nobody guesses 256 random bits, and a slow hash
on every call would be a lever for whoever sends wrong keys. The salt keeps equal hashes from being seen as such.
"""

import hmac
import re
import secrets
import time
from base64 import urlsafe_b64encode
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from .caller import Refused
from .settings import NO_LIMITS, Limits, TenantName

PREFIX = "isthmus"
PATTERN = re.compile(r"isthmus_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_SECRET_BYTES, _SALT_BYTES = 32, 16

Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeyRecord(BaseModel):
    """What is kept of one key. Unknown keys are errors: a limit with a typing error would be no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Hex16
    tenant: TenantName
    name: str = Field(default="", max_length=128, description="A person's note.")
    salt: Hex32
    hash: Hex64
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    limits: Limits = NO_LIMITS

    def state(self, now: datetime) -> str:
        """ "valid", "expired" or "revoked"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


def new_key(
    tenant: str, *, name: str = "", limits: Limits = NO_LIMITS, expires: datetime | None = None
) -> tuple[str, KeyRecord]:
    """A key, which is shown once and kept nowhere, and the record of it."""
    key_id, salt = secrets.token_hex(8), secrets.token_hex(_SALT_BYTES)
    secret = urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip("=")
    record = KeyRecord(
        id=key_id,
        tenant=tenant,
        name=name,
        salt=salt,
        hash=digest(salt, secret).hex(),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        limits=limits,
    )
    return f"{PREFIX}_{key_id}_{secret}", record


def digest(salt: str, secret: str) -> bytes:
    """What is kept of a secret; `salt` is hex."""
    return hmac.digest(bytes.fromhex(salt), secret.encode(errors="replace"), "sha256")


# Stands for every id that is not there, so that those are looked at as long as the others. No secret has this hash.
_NOBODY = KeyRecord(
    id="0" * 16,
    tenant="nobody",
    salt=secrets.token_hex(_SALT_BYTES),
    hash=secrets.token_hex(32),
    created=datetime.now(UTC),
)


class KeyTable:
    """The keys of one file, as of one reading."""

    def __init__(self, records: Iterable[KeyRecord]) -> None:
        """ValueError where two have one id."""
        self._records: dict[str, KeyRecord] = {}
        self._of_tenant: dict[str, list[KeyRecord]] = defaultdict(list)
        for record in records:
            if record.id in self._records:
                raise ValueError(f"key {record.id} is there twice")
            self._records[record.id] = record
            self._of_tenant[record.tenant].append(record)

    def verify(self, text: str) -> KeyRecord:
        """The record of a key. Refused where it is none, is of nobody, has expired or is revoked.

        An unknown id takes the same steps as a wrong secret, and the answer is the same. Only who has shown the right
        secret is told more.
        """
        found = PATTERN.fullmatch(text)
        key_id, secret = (found[1], found[2]) if found else ("", text)
        record = self._records.get(key_id)
        checked = _NOBODY if record is None else record
        right = hmac.compare_digest(digest(checked.salt, secret), bytes.fromhex(checked.hash))
        if record is None or not right:
            raise Refused("unknown", "this is not a valid API key", key_id=record.id if record else "")
        state = record.state(datetime.fromtimestamp(time.time(), UTC))
        if state != "valid":
            raise Refused(
                state, f"API key {record.id} {'has expired' if state == 'expired' else 'is revoked'}", record.id
            )
        return record

    def valid(self) -> int:
        """How many would be let in now."""
        now = datetime.fromtimestamp(time.time(), UTC)
        return sum(record.state(now) == "valid" for record in self._records.values())

    def limits_of(self, tenant: str) -> Limits | None:
        """The widest limits of a tenant's valid keys, each by itself; None where it has no valid key."""
        now = datetime.fromtimestamp(time.time(), UTC)
        found = [record.limits for record in self._of_tenant.get(tenant, ()) if record.state(now) == "valid"]
        return widest(found) if found else None


def widest(limits: Iterable[Limits]) -> Limits:
    """Of each limit the most that one of them allows."""
    limits = list(limits)
    wide: dict[str, float | None] = {}
    for name in Limits.model_fields.keys() - {"weight", "max_priority"}:
        values = [getattr(each, name) for each in limits]
        wide[name] = None if None in values else max(values)
    wide["weight"] = max((each.weight for each in limits if each.weight is not None), default=None)
    return Limits.model_validate(wide)
