"""All that is answered as OpenAI's API does, or as vLLM does beside it."""

from ..door import Endpoint
from .chat import ENDPOINTS as CHAT
from .completions import ENDPOINTS as COMPLETIONS
from .models import ENDPOINTS as MODELS
from .tokens import ENDPOINTS as TOKENS

ENDPOINTS: tuple[Endpoint, ...] = (*CHAT, *COMPLETIONS, *MODELS, *TOKENS)
