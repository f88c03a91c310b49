"""Schemas of kinds whose CRDs are not at hand: what the chart uses of them, written from their projects' reference.

cert-manager v1 (Certificate, Issuer), KEDA v1alpha1 (ScaledObject), Gateway API v1 (GRPCRoute, HTTPRoute).
"""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(h|m|s|ms))+$"}


def _object(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


def _kind(spec: Schema) -> Schema:
    return _object("spec", apiVersion=_TEXT, kind=_TEXT, metadata={"type": "object"}, spec=spec)


_ISSUER_REF = _object("name", name=_TEXT, kind={"enum": ["Issuer", "ClusterIssuer"]}, group=_TEXT)
_USAGES = {"enum": ["digital signature", "key encipherment", "server auth", "client auth"]}
_BACKENDS = {"type": "array", "items": _object("name", name=_TEXT, port=_COUNT)}
_TIMEOUT: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}  # GEP-2257
_PARENT = _object("name", group=_TEXT, kind=_TEXT, namespace=_TEXT, name=_TEXT, sectionName=_TEXT, port=_COUNT)

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("cert-manager.io/v1", "Issuer"): _kind(
        {
            **_object(selfSigned=_object(), ca=_object("secretName", secretName=_TEXT)),
            "minProperties": 1,
            "maxProperties": 1,
        }
    ),
    ("cert-manager.io/v1", "Certificate"): _kind(
        _object(
            "secretName issuerRef",
            secretName=_TEXT,
            issuerRef=_ISSUER_REF,
            isCA={"type": "boolean"},
            commonName={**_TEXT, "maxLength": 64},
            dnsNames=_TEXTS,
            ipAddresses=_TEXTS,
            uris={"type": "array", "items": {"type": "string", "pattern": r"^[a-z]+://[^/]+/[a-z]+/[a-z0-9-]+$"}},
            usages={"type": "array", "items": _USAGES},
            duration=_DURATION,
            renewBefore=_DURATION,
            privateKey=_object(
                algorithm={"enum": ["RSA", "ECDSA", "Ed25519"]},
                size={"enum": [256, 384, 521, 2048, 4096]},
                rotationPolicy={"enum": ["Never", "Always"]},
            ),
        )
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _kind(
        _object(
            "scaleTargetRef triggers",
            scaleTargetRef=_object("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
            minReplicaCount=_COUNT,
            maxReplicaCount=_COUNT,
            triggers={
                "type": "array",
                "minItems": 1,
                "items": _object(
                    "type metadata",
                    type=_TEXT,
                    name=_TEXT,
                    metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                    metadata={"type": "object", "additionalProperties": {"type": "string"}},
                ),
            },
        )
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _kind(
        _object(
            parentRefs={"type": "array", "items": _PARENT},
            hostnames=_TEXTS,
            rules={"type": "array", "items": _object(backendRefs=_BACKENDS)},
        )
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _kind(
        _object(
            parentRefs={"type": "array", "items": _PARENT},
            hostnames=_TEXTS,
            rules={
                "type": "array",
                "items": _object(backendRefs=_BACKENDS, timeouts=_object(request=_TIMEOUT, backendRequest=_TIMEOUT)),
            },
        )
    ),
}
