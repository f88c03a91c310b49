"""JSON Web Tokens: who a token says that asks, and everything that is no proof of it."""

import base64
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from isthmus.cluster.access.caller import Refused
from isthmus.cluster.access.settings import ALGORITHMS, AccessSettings, JwtSettings, Limits
from isthmus.cluster.access.tokens import parse_key_set, verify

EC = ec.generate_private_key(ec.SECP256R1())
OTHER_EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
ED = ed25519.Ed25519PrivateKey.generate()
SETTINGS = JwtSettings(
    issuer="https://id.example",
    audience="isthmus",
    jwks_file="jwks.json",
    algorithms=ALGORITHMS,
    tenants={"acme": Limits(running=3), "web": Limits()},
)


def entry(key: Any, kid: str | None = "one", **more: Any) -> dict[str, Any]:
    """The public key as a JWK set has it."""
    kinds = {ec.EllipticCurvePrivateKey: ECAlgorithm, rsa.RSAPrivateKey: RSAAlgorithm}
    algorithm = next((kinds[kind] for kind in kinds if isinstance(key, kind)), OKPAlgorithm)
    found = json.loads(algorithm.to_jwk(key.public_key()))
    return {**found, **({"kid": kid} if kid else {}), **more}


def key_set(*entries: dict[str, Any]) -> Any:
    return parse_key_set(json.dumps({"keys": entries}).encode())


KEYS = key_set(entry(EC, "one"), entry(RSA, "two"), entry(ED, "three"))


def token(key: Any = EC, algorithm: str = "ES256", kid: str | None = "one", **changes: Any) -> str:
    claims = {"iss": "https://id.example", "aud": "isthmus", "exp": time.time() + 60, "tenant": "acme", "sub": "alice"}
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid} if kid else {})


def refusal(text: str, keys: Any = KEYS, settings: JwtSettings = SETTINGS) -> str:
    with pytest.raises(Refused) as raised:
        verify(text, keys, settings)
    assert raised.value.reason == "token"
    return str(raised.value)


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [(EC, "ES256", "one"), (RSA, "RS256", "two"), (RSA, "PS512", "two"), (ED, "EdDSA", "three")],
)
def test_a_token_says_who_asks(key: Any, algorithm: str, kid: str) -> None:
    caller = verify(token(key, algorithm, kid), KEYS, SETTINGS)
    assert (caller.tenant, caller.limits, caller.account) == ("acme", Limits(running=3), "tenant acme")
    assert caller.name == "token of 'alice'"


def test_a_single_key_needs_no_id() -> None:
    assert verify(token(kid=None), key_set(entry(EC, None)), SETTINGS).tenant == "acme"
    assert verify(token(kid=None), key_set(entry(EC, "one")), SETTINGS).tenant == "acme"
    assert refusal(token(kid=None)) == "this is not a valid token"
    assert refusal(token(kid="other"), key_set(entry(EC, "one"))) == "this is not a valid token"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"exp": time.time() - 31}, ": it has expired"),
        ({"exp": None}, ": it needs exp, iss and aud"),
        ({"iss": None}, ": it needs exp, iss and aud"),
        ({"aud": None}, ": it needs exp, iss and aud"),
        ({"iss": "https://evil.example"}, ": it has another issuer (iss)"),
        ({"aud": "somebody"}, ": it is for somebody else (aud)"),
        ({"aud": ["somebody", "else"]}, ": it is for somebody else (aud)"),
        ({"nbf": time.time() + 86_400}, ": it is not valid yet"),
        ({"exp": "soon"}, ""),
    ],
)
def test_claims_that_prove_nothing(changes: dict[str, Any], why: str) -> None:
    assert refusal(token(**changes)) == f"this is not a valid token{why}"


def test_clocks_may_differ_by_the_leeway() -> None:
    assert verify(token(exp=time.time() - 20), KEYS, SETTINGS).tenant == "acme"
    strict = SETTINGS.model_copy(update={"leeway_s": 0.0})
    assert refusal(token(exp=time.time() - 20), settings=strict).endswith("expired")


@pytest.mark.parametrize("tenant", [None, "", 7, ["acme"], {"a": 1}, "a\nb", "a" * 129])
def test_a_token_must_name_a_tenant(tenant: Any) -> None:
    assert "names no tenant: its claim tenant" in refusal(token(tenant=tenant))


def test_a_tenant_that_is_not_named_is_refused_unless_others_are() -> None:
    assert refusal(token(tenant="stranger")) == "this token's tenant may not ask here"
    open_to_all = SETTINGS.model_copy(update={"tenants": {**SETTINGS.tenants, "*": Limits(running=1)}})
    assert verify(token(tenant="stranger"), KEYS, open_to_all).limits == Limits(running=1)
    assert verify(token(), KEYS, open_to_all).limits == Limits(running=3)


def test_the_tenant_may_be_in_another_claim() -> None:
    settings = SETTINGS.model_copy(update={"tenant_claim": "org"})
    assert verify(token(org="web"), KEYS, settings).tenant == "web"
    assert "its claim org" in refusal(token(), settings=settings)


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_forgeries() -> None:
    whole = token()
    header, payload, signature = whole.split(".")
    claims = {"iss": "https://id.example", "aud": "isthmus", "exp": time.time() + 60, "tenant": "web"}
    public = EC.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    shared = f"{part({'alg': 'HS256', 'kid': 'one'})}.{part(claims)}"
    sealed = base64.urlsafe_b64encode(hmac.digest(public, shared.encode(), "sha256")).decode().rstrip("=")
    forged = [
        f"{header}.{part(claims)}.{signature}",  # other claims
        token(OTHER_EC),  # another key under the same id
        f"{part({'alg': 'none', 'kid': 'one'})}.{part(claims)}.",
        f"{part({'alg': 'None', 'kid': 'one'})}.{part(claims)}.",
        f"{shared}.{sealed}",  # the public key as a shared secret
        f"{part({'alg': 'RS256', 'kid': 'one'})}.{payload}.{signature}",  # the algorithm of another key
        f"{part({'alg': ['ES256'], 'kid': 'one'})}.{payload}.{signature}",
        f"{part({'alg': 'ES256', 'kid': ['one']})}.{payload}.{signature}",
        f"{part({'alg': 'ES256', 'kid': '../../etc/passwd'})}.{payload}.{signature}",
        f"{part({'alg': 'ES256', 'kid': 'one', 'crit': ['x'], 'x': 1})}.{payload}.{signature}",
        f"{part({'alg': 'ES256', 'kid': 'one', 'jwk': entry(OTHER_EC)})}.{payload}.{signature}",
        f"{header}.{payload}.",
        f"{header}.{payload}.{'A' * 86}",
        f"{header}..{signature}",
        "..",
        "a.b.c",
        f"{header}.{payload}.{signature}.{signature}",
        f"{'A' * 5000}.{payload}.{signature}",
    ]
    for text in forged:
        assert refusal(text) == "this is not a valid token"
    for end in range(0, len(whole), 7):
        assert refusal(whole[:end]) == "this is not a valid token"


def test_an_algorithm_that_is_not_allowed_is_refused_though_the_key_is_right() -> None:
    settings = SETTINGS.model_copy(update={"algorithms": ("ES256",)})
    assert verify(token(), KEYS, settings).tenant == "acme"
    assert refusal(token(RSA, "RS256", "two"), settings=settings) == "this is not a valid token"
    only = key_set(entry(RSA, "two", alg="RS256"))
    assert refusal(token(RSA, "PS256", "two"), only) == "this is not a valid token"


def test_a_short_key_proves_nothing() -> None:
    with pytest.warns(Warning, match="RSA key"):
        weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        text = token(weak, "RS256", "weak")
    assert refusal(text, key_set(entry(weak, "weak"))) == "this is not a valid token"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a JWK set"),
        (b"[]", "is not a JWK set"),
        (b"{}", "is not a JWK set"),
        (b'{"keys": []}', "has no public keys"),
        (b'{"keys": [1, "x"]}', "has no public keys"),
        (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "has private or symmetric keys"),
        (json.dumps({"keys": [entry(EC, use="enc")]}).encode(), "has no public keys"),
        (json.dumps({"keys": [entry(EC), entry(OTHER_EC)]}).encode(), "has two keys of one id"),
        (json.dumps({"keys": [{**entry(EC), "d": "x"}]}).encode(), "has private or symmetric keys"),
        (json.dumps({"keys": [{**entry(EC), "x": "AAAA"}]}).encode(), "has a key that cannot be used: InvalidKeyError"),
    ],
)
def test_a_file_that_is_no_key_set(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_key_set(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwt": {"issuer": "a", "audience": "b"}}, "missing: jwks_file"),
        ({"jwt": {"jwks_file": "f"}}, "missing: issuer, audience"),
        ({"jwt": {"tenants": {"a": {}}}}, "missing: issuer, audience, jwks_file"),
        ({"jwt": {"algorithms": ["HS256"]}}, "no algorithm 'HS256'"),
        ({"jwt": {"algorithms": ["none"]}}, "no algorithm 'none'"),
        ({"jwt": {"algorithms": []}}, "at least 1 item"),
        ({"jwt": {"tenants": {"": {}}}}, "at least 1 character"),
        ({"jwt": {"tenants": {"a": {"weight": 0}}}}, "greater than 0"),
        ({"jwt": {"tenants": {"a": {"weight": float("inf")}}}}, "finite"),
        ({"keys_file": ""}, "at least 1 character"),
        ({"keys_file": "f", "anonymous": True}, "anonymous lets everybody in"),
        ({"keyfile": "f"}, "Extra inputs"),
    ],
)
def test_settings_that_say_nothing_clear(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AccessSettings.model_validate(settings)


def test_a_file_of_keys_is_named_by_no_default(tmp_path: Path) -> None:
    assert AccessSettings().guarded is False
    assert AccessSettings(keys_file=str(tmp_path / "missing")).guarded is True
    assert AccessSettings(jwt=SETTINGS).guarded is True
