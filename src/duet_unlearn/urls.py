"""URLs in texts for people: what may be shown, logged, written into a file and published.

A URL may hold a password (`https://me:secret@host/`) or be signed (`?X-Amz-Signature=...`), and a
library's message may quote it. So texts are cleaned where they leave the program, whole.
"""

import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# One URL inside a text: up to a space, a quote or a bracket, less what closes a clause.
_URL_IN_TEXT = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<rest>[^\s'\"<>]+?)(?=[:;,)]*(?:[\s'\"<>]|$))",
    re.IGNORECASE,
)
_USER = re.compile(r"[^/?#]*@")
# A password with a raw `/`, `?`, `#` ends the host early: what should be a port is then no number.
_ODD_USER = re.compile(r"[^/@:\[]+:(?!\d*(?:[/?#]|$)).*@(?!sha256:)")
_QUERY = re.compile(r"[?#].*?(?=@sha256:|$)")


def is_url(name: str | Path) -> bool:
    """Say whether a cache is named by a URL; a plain path is read where it lies."""
    return isinstance(name, str) and _URL.match(name) is not None


def protocol_of(url: str) -> str:
    """Return a URL's protocol in lower case, `file` for a plain path."""
    return url.partition("://")[0].lower() if is_url(url) else "file"


def redact_url(text: str) -> str:
    """Return a text without the users, passwords, queries and fragments of the URLs in it.

    A plain path and an `@sha256:...` behind a URL stay as they are.
    """
    return _URL_IN_TEXT.sub(lambda found: found["scheme"] + _redact(found["rest"]), text)


def _redact(rest: str) -> str:
    for user in (_USER, _ODD_USER):
        if found := user.match(rest):
            rest = rest[found.end() :]
            break
    return _QUERY.sub(lambda found: found[0][0] + "...", rest, count=1)


def published_name(name: str) -> str:
    """Return how a file that is passed on names a cache, a model or a file.

    A URL loses its secrets and an absolute local path all but its last part: where a file lay on
    one machine helps nobody elsewhere, and tells who trained there.
    """
    scheme, colon, rest = name.partition(":")
    if scheme == "hub" and colon:  # which may be a folder
        return f"hub:{published_name(rest)}"
    if scheme.lower() in ("file", "local") and rest.startswith("//"):
        return published_name(rest[2:])
    if is_url(name):
        return redact_url(name)
    path, pin, digest = name.partition("@sha256:")
    local = Path(path)
    return f"{local.name}{pin}{digest}" if local.is_absolute() or path[:1] == "~" else name


def published_value(value: Any) -> Any:
    """Return a JSON value with every text in it as `published_name` gives it."""
    if isinstance(value, dict):
        return {name: published_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [published_value(item) for item in value]
    return published_name(value) if isinstance(value, str) else value


def visible(text: str) -> str:
    r"""Return a line of text with what a terminal would act on written out: `\x1b`, `\u202e`.

    Escapes in text from elsewhere (a manifest, a server's answer, a file name) can move the cursor,
    hide what stands before them or set the window's title.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
