"""Settings of a supervisor that is a process apart from the gateways."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..proto.rpc.addresses import checked_address
from . import defaults


class SupervisorConfig(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = Field(
        default=defaults.SUPERVISOR,
        description="host:port for status, orders and the list of workers.",
    )
    health_listen: str | None = Field(
        default=None, description="host:port for health probes in plain text; default: on its port only."
    )

    @field_validator("listen", "health_listen")
    @classmethod
    def _can_be_bound(cls, value: str | None) -> str | None:
        return value if value is None else checked_address(value)
