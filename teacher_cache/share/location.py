"""Where a cache is: a local folder or a URL, with or without the digest that it has to have.

Nothing here imports fsspec, so commands on local caches stay quick.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from duet_unlearn.errors import CacheError
from duet_unlearn.teacher_cache.format.manifest import split_pin
from duet_unlearn.urls import is_url, protocol_of
from duet_unlearn.urls import redact_url as hide_credentials

__all__ = ["Location", "hide_credentials", "is_url", "parse_location", "protocol_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """A cache's place as the user gave it."""

    url: str
    """A URL or a local path, without a slash at its end."""
    pin: str | None
    """`sha256:<hex>` that the cache has to have, or None."""

    @property
    def shown(self) -> str:
        """The place without a password, for messages."""
        return hide_credentials(self.url)


def parse_location(cache: str | Path) -> Location:
    """Split `URL` or `URL@sha256:DIGEST`; a plain path is a location too.

    Raises:
        CacheError: The digest is not 64 hex digits, or the URL is one that no file name can be
            put behind.
    """
    text = str(cache)
    path, pin = split_pin(text)
    if not is_url(text):
        return Location(url=str(path), pin=pin)
    url = text if pin is None else text.rpartition("@sha256:")[0]
    shown = hide_credentials(url)
    if "::" in url:
        raise CacheError(f"{shown}: chained URLs are not supported; give one URL of a folder")
    if protocol_of(url) in ("http", "https"):
        parts = urlsplit(url)
        if not parts.netloc or parts.query or parts.fragment:
            raise CacheError(
                f"{shown}: expected https://HOST/FOLDER without a query; a cache is several files "
                "below one URL"
            )
    return Location(url=url.rstrip("/"), pin=pin)
