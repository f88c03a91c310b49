"""Calls with certificates that must not let anybody in: of an end, a CA, a cluster, a role or a name that is wrong."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from isthmus.proto.rpc.addresses import grpc_target
from isthmus.proto.security.authority import ANYBODY, CALLERS
from isthmus.proto.security.certificates import KeyPair, make_ca
from isthmus.proto.security.identity import ROLES, server_name
from isthmus.proto.security.state import LOCAL

from .doors import NAME, Doors, forged
from .fleet import Fleet
from .inputs import Input, Outcome
from .values import Values

LIMIT_S = 5.0
_OTHER_CA = make_ca(LOCAL)


def uri(cluster: str, role: str, name: str = NAME) -> str:
    """The name of a process, unchecked."""
    return f"isthmus://{cluster}/{role}/{name}"


def any_role(rng: random.Random) -> str:
    return rng.choice(ROLES)


Wrong = Callable[[Doors, random.Random], KeyPair]
WRONG: dict[str, Wrong] = {
    "expired": lambda doors, rng: forged(doors.ca, [uri(LOCAL, any_role(rng))], days=-1),
    "other CA": lambda doors, rng: forged(_OTHER_CA, [uri(LOCAL, any_role(rng))]),
    "no CA": lambda doors, rng: forged(None, [uri(LOCAL, any_role(rng))]),
    "other cluster": lambda doors, rng: forged(doors.ca, [uri("other", any_role(rng))]),
    "no name": lambda doors, rng: forged(doors.ca, []),
    "odd name": lambda doors, rng: forged(
        doors.ca,
        [
            rng.choice(
                (
                    *(
                        uri(LOCAL, "root"),
                        uri("", any_role(rng)),
                        uri(LOCAL, any_role(rng), ""),
                        "isthmus:///",
                        "isthmus://",
                    ),
                    *(uri(LOCAL, any_role(rng).upper()), uri(LOCAL + "/x", any_role(rng)), "http://local/admin/x"),
                    *(uri(LOCAL, "%61dmin"), uri(LOCAL, "admin/x"), " " + uri(LOCAL, "admin"), "isthmus://local"),
                )
            )
        ],
    ),
    "many names": lambda doors, rng: forged(doors.ca, [uri("other", any_role(rng), f"n{n}") for n in range(300)]),
}


async def call_as(doors: Doors, fleet: Fleet, outcome: Outcome, number: int, rng: random.Random) -> None:
    """One call of somebody who may not make it, or of one role."""
    method = rng.choice(fleet.methods)
    addresses = [address for address in method.addresses if not fleet.is_plain(address)]
    if not addresses:
        return
    address = rng.choice(addresses)
    role = any_role(rng)
    right = rng.random() < 0.3
    what = f"as {role}" if right else rng.choice(sorted(WRONG))
    pair = forged(doors.ca, [uri(LOCAL, role)]) if right else WRONG[what](doors, rng)
    data = Values(rng, fleet.known).request(method.input, fleet.valid.get(method.input.full_name, ()))
    made = Input(kind="certificate", target=fleet.label(address), what=what, number=number, data=data)
    outcome.sent(made)
    callers = CALLERS.get(method.path, frozenset())
    # Where a certificate is asked for, one of the cluster's CA without a name is let in, and is nobody.
    nobody = fleet.is_public(address) or what in NAMELESS
    anybody = nobody and ANYBODY in callers
    name = server_name(fleet.server_at(address), LOCAL)
    status = await _status(address, name, method, data, doors.ca.certificate, pair)
    outcome.statuses[f"certificate: {status}"] += 1
    if status not in REFUSED and not anybody and not (right and role in callers):
        outcome.failed(f"{method.path} with a certificate that is {what}: {status}", made)


NAMELESS = ("no name", "odd name")
REFUSED = (grpc.StatusCode.PERMISSION_DENIED.name, grpc.StatusCode.UNAVAILABLE.name, "cancelled")


async def _status(address: str, name: str, method: Any, data: bytes, ca: bytes, pair: KeyPair) -> str:
    """How a call ended on a connection of its own."""
    credentials = grpc.ssl_channel_credentials(ca, pair.key, pair.certificate)
    options = (("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.secure_channel(grpc_target(address), credentials, options=options) as channel:
        streams = method.kind.startswith("stream")
        call: Any = getattr(channel, method.kind)(method.path)(*(() if streams else (data,)), timeout=LIMIT_S)
        try:
            async with asyncio.timeout(method.limit_s + 1):
                if method.kind.endswith("unary"):
                    await call
                else:
                    with contextlib.suppress(grpc.aio.BaseError):  # the call has ended already: how, its code says
                        if streams:
                            await call.done_writing()
                        await call.read()
                    return "OK" if method.limit_s < 1 and not call.done() else (await call.code()).name
        except TimeoutError:
            return "cancelled"
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return (await call.code()).name
        finally:
            call.cancel()
        return "OK"
