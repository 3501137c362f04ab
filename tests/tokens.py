"""Tokens, made without taskd's own code."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

SECRET = "a-secret-for-the-tests-of-at-least-32-bytes"
OTHER_SECRET = "another-secret-of-at-least-32-bytes-indeed"
DAY = 24 * 3600  # seconds of a token's life: a table of tokens is made long before its last test


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(header: object, payload: object, secret: str = SECRET) -> str:
    """Return a compact JWS, HMAC SHA-256; a header or payload of bytes is not encoded as JSON."""
    parts = [
        base64url(part if isinstance(part, bytes) else json.dumps(part).encode())
        for part in (header, payload)
    ]
    signing_input = ".".join(parts)
    signature = hmac.digest(secret.encode(), signing_input.encode(), hashlib.sha256)
    return f"{signing_input}.{base64url(signature)}"


def token(user: str = "alice", secret: str = SECRET, **claims: object) -> str:
    """Return a token like Better Auth's; a claim that is None is left out."""
    now = int(time.time())
    claims = {
        "sub": user,
        "iat": now,
        "exp": now + DAY,
        "email": f"{user}@example.com",
        "name": user,
    } | claims
    return sign(
        {"alg": "HS256", "typ": "JWT"},
        {name: value for name, value in claims.items() if value is not None},
        secret,
    )


def bearer(user: str = "alice", secret: str = SECRET, **claims: object) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(user, secret, **claims)}"}
