"""Settings of the gateway's HTTP door, under `gateway: {http: ...}`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ..worker.config import Names


def _word(value: Any) -> Any:
    """YAML reads `on` and `off` as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


HttpTls = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class HttpConfig(BaseModel):
    """How the gateway answers over HTTP. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tls: HttpTls = Field(
        default="auto",
        description="auto: plain text on loopback, the gateway's certificate elsewhere; on, off: always, never.",
    )
    strict_fields: bool = Field(
        default=True, description="Whether a field that is not known is an error; else it is ignored."
    )
    cors_origins: Names = Field(
        default=(), description='Origins whose pages may ask (https://app.example), "*" for all; default: none.'
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Bytes of a request's body.")
    default_max_tokens: int = Field(
        default=1024, ge=1, description="Most output of a chat that says no max_tokens; less where the context ends."
    )

    page: bool = Field(default=True, description="Whether / is a page to try the cluster in a browser.")

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, _, host = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host):
                raise ValueError(f"{origin!r} is no origin; allowed: as https://app.example, with no path, or *")
        return origins
