"""What models of answers have in common. They are for the OpenAPI document and for tests: answers are plain data."""

from pydantic import BaseModel, ConfigDict


class Told(BaseModel):
    """A JSON object that the gateway sends."""

    model_config = ConfigDict(extra="forbid")
