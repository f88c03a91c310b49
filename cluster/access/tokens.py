"""JSON Web Tokens of an identity provider (RFC 7519), verified with the public keys of a JWK set (RFC 7517)."""

import json
from collections.abc import Mapping
from typing import Any

import jwt

from ...proto.names import MAX_NAME
from .caller import Caller, Refused
from .settings import OTHERS, JwtSettings

MAX_BYTES = 1 << 20  # of a file of keys
_OF_CURVE = {"P-256": ("ES256",), "P-384": ("ES384",), "P-521": ("ES512",)}
_OF_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "k"}

KeySet = Mapping[tuple[str | None, str], jwt.PyJWK]  # by key id and algorithm


def parse_key_set(data: bytes) -> KeySet:
    """The public keys of a JWK set, each for all algorithms that it may be used with. ValueError where there are none.

    A single key is found by tokens without a key id too.
    """
    try:
        entries = json.loads(data)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('is not a JWK set: {"keys": [...]}') from None
    keys: dict[tuple[str | None, str], jwt.PyJWK] = {}
    usable = [entry for entry in entries if isinstance(entry, dict) and entry.get("use", "sig") == "sig"]
    for entry in usable:
        if _PRIVATE & set(entry):
            raise ValueError("has private or symmetric keys: it must have public keys only")
        for algorithm in _algorithms(entry):
            kid = entry.get("kid")
            try:
                key = jwt.PyJWK(entry, algorithm)
            except jwt.PyJWTError as error:
                raise ValueError(f"has a key that cannot be used: {type(error).__name__}") from None
            if (kid, algorithm) in keys:
                raise ValueError("has two keys of one id")
            keys[(kid, algorithm)] = key
            if len(usable) == 1:
                keys[(None, algorithm)] = key
    if not keys:
        raise ValueError("has no public keys for signatures")
    return keys


def _algorithms(entry: Mapping[str, Any]) -> tuple[str, ...]:
    kind, curve = entry.get("kty"), entry.get("crv")
    fitting = _OF_RSA if kind == "RSA" else _OF_CURVE.get(str(curve), ()) if kind == "EC" else ()
    if kind == "OKP" and curve == "Ed25519":
        fitting = ("EdDSA",)
    named = entry.get("alg")
    return tuple(name for name in fitting if named in (None, name))


def verify(token: str, keys: KeySet, settings: JwtSettings) -> Caller:
    """Who a token says that asks. Refused where it does not prove that, or says of no tenant that may ask."""
    try:
        header = jwt.get_unverified_header(token)
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in settings.algorithms or (kid, algorithm) not in keys:
            raise jwt.InvalidAlgorithmError
        claims = jwt.decode(
            token,
            keys[(kid, algorithm)],
            algorithms=[algorithm],
            audience=settings.audience,
            issuer=settings.issuer,
            leeway=settings.leeway_s,
            options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
        )
    except Exception as error:  # whatever it was: nothing is proven
        raise Refused("token", f"this is not a valid token{_WHY.get(type(error), '')}") from None
    return _caller(claims, settings)


_WHY: dict[type[Exception], str] = {  # raised once the signature is verified
    jwt.ExpiredSignatureError: ": it has expired",
    jwt.ImmatureSignatureError: ": it is not valid yet",
    jwt.InvalidAudienceError: ": it is for somebody else (aud)",
    jwt.InvalidIssuerError: ": it has another issuer (iss)",
    jwt.MissingRequiredClaimError: ": it needs exp, iss and aud",
}


def _caller(claims: Mapping[str, Any], settings: JwtSettings) -> Caller:
    tenant = claims.get(settings.tenant_claim)
    if not isinstance(tenant, str) or not 1 <= len(tenant) <= MAX_NAME or not tenant.isprintable():
        raise Refused("token", f"this token names no tenant: its claim {settings.tenant_claim} must be a name")
    limits = settings.tenants.get(tenant, settings.tenants.get(OTHERS))
    if limits is None:
        raise Refused("token", "this token's tenant may not ask here")
    subject = str(claims.get("sub", ""))[:MAX_NAME]
    return Caller(name=f"token of {subject!r}", tenant=tenant, limits=limits, account=f"tenant {tenant}")
