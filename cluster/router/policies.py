"""The names of what one may choose about where requests run."""

from typing import Literal

LocalPrefill = Literal["never", "when_cheaper", "always"]  # whether decode workers may compute prompts themselves
Policy = Literal["cost", "round-robin", "least-requests", "least-queued-tokens", "prefix-affinity"]  # docs/routing.md
