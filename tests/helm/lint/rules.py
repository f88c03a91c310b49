"""All rules for the objects of a release. Pure: objects in, problems out."""

from . import network, pods, ray, references
from .objects import Cluster


def problems(cluster: Cluster) -> list[str]:
    """What is wrong, a line each; none where the objects may be applied."""
    return [found for rules in (references, pods, ray, network) for found in rules.problems(cluster)]
