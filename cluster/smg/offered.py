"""Adds the vLLM engine protocol to a gateway's services, where the package with its messages is installed."""

from ...proto.errors import InvalidRequest
from ...proto.rpc.server import Services
from .behind import Behind


def vllm_engine(behind: Behind) -> Services:
    """The service of `gateway.engine_protocol: vllm`; InvalidRequest where its package is missing or does not fit."""
    try:
        from .servicer import ENGINE, VllmEngine, add_to
    except (ImportError, RuntimeError) as error:  # RuntimeError: stubs for a newer gRPC
        raise InvalidRequest(
            f"gateway.engine_protocol is vllm, which needs smg-grpc-proto ({error}): pip install 'isthmus[smg]'"
        ) from None
    servicer = VllmEngine(behind)
    return {ENGINE: lambda server: add_to(servicer, server)}
