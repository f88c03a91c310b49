"""Settings of who may ask a gateway, and how much: under `gateway: {access: ...}`, and in the file of API keys."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...proto.common_pb2 import PRIORITY_BATCH, PRIORITY_INTERACTIVE, PRIORITY_STANDARD, Priority
from ...proto.names import MAX_NAME
from ...worker.config import Names

# Signatures that a public key verifies: with a symmetric algorithm whoever verifies could sign.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
OTHERS = "*"  # in place of a tenant's name: every tenant that is not named

PriorityName = Literal["interactive", "standard", "batch"]
PRIORITIES: dict[PriorityName, Priority.ValueType] = {
    "interactive": PRIORITY_INTERACTIVE,
    "standard": PRIORITY_STANDARD,
    "batch": PRIORITY_BATCH,
}
TenantName = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class Limits(BaseModel):
    """What one API key, or a tenant of a token, may have. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float | None = Field(
        default=None, gt=0, description="Share while others wait; default: what tenant_weights says."
    )
    max_priority: PriorityName = Field(
        default="interactive", description="Largest priority: interactive, standard or batch."
    )
    requests_per_min: int | None = Field(default=None, ge=1, description="Requests that begin in a minute.")
    tokens_per_min: int | None = Field(default=None, ge=1, description="Tokens in a minute, of prompts and outputs.")
    running: int | None = Field(default=None, ge=1, description="Requests at once, those that wait included.")
    max_request_tokens: int | None = Field(default=None, ge=2, description="Tokens of one request, prompt and output.")
    max_request_kv_mib: float | None = Field(default=None, gt=0, description="KV of one request on the wire, in MiB.")
    max_request_s: float | None = Field(default=None, gt=0, description="Time of one request from arrival to end.")

    @property
    def given(self) -> dict[str, int | float | str]:
        """Those that are not at their default."""
        return {name: value for name, value in self if value != type(self).model_fields[name].default}


NO_LIMITS = Limits()


class JwtSettings(BaseModel):
    """Tokens of an identity provider. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str | None = Field(default=None, min_length=1, description="What the claim iss of a token must be.")
    audience: str | None = Field(default=None, min_length=1, description="What the claim aud of a token must name.")
    jwks_file: str | None = Field(
        default=None,
        min_length=1,
        description="File of the issuer's public keys (a JWK set), read anew when it changes.",
    )
    tenant_claim: str = Field(default="tenant", min_length=1, description="Claim with the tenant's name.")
    algorithms: Names = Field(
        default=("RS256", "PS256", "ES256", "EdDSA"),
        min_length=1,
        description=f"Signatures that are accepted, of {', '.join(ALGORITHMS)}.",
    )
    leeway_s: float = Field(default=30.0, ge=0, le=300, description="What clocks may differ by.")
    tenants: dict[TenantName, Limits] = Field(
        default={}, description='Limits of each tenant; "*" is for those not named, who are refused without it.'
    )

    @field_validator("algorithms")
    @classmethod
    def _asymmetric(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in ALGORITHMS:
                raise ValueError(f"no algorithm {name!r}; allowed: {', '.join(ALGORITHMS)}")
        return names

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {name: getattr(self, name) for name in ("issuer", "audience", "jwks_file")}
        missing = [name for name, value in needed.items() if value is None]
        if missing and (len(missing) < len(needed) or self.tenants):
            raise ValueError(f"tokens need issuer, audience and jwks_file; missing: {', '.join(missing)}")
        return self

    @property
    def enabled(self) -> bool:
        """Whether tokens are accepted at all."""
        return self.jwks_file is not None


class AccessSettings(BaseModel):
    """Who may call the gateway's client port. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_file: str | None = Field(
        default=None, min_length=1, description="File of API keys (`isthmus keys`), read anew when it changes."
    )
    jwt: JwtSettings = Field(default=JwtSettings(), description="Tokens of an identity provider.")
    anonymous: bool = Field(default=False, description="Whether everybody may ask who reaches the port, from anywhere.")

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.anonymous and self.guarded:
            raise ValueError("anonymous lets everybody in: remove it, or remove keys_file and jwt")
        return self

    @property
    def guarded(self) -> bool:
        """Whether a caller must show a key or a token."""
        return self.keys_file is not None or self.jwt.enabled
