"""All that is answered as OpenAI's API does."""

from ..door import Endpoint
from .models import ENDPOINTS as MODELS

ENDPOINTS: tuple[Endpoint, ...] = (*MODELS,)
