"""What of a URL may be shown, written and published, and text that a terminal cannot act on."""

import pytest

from duet_unlearn.errors import DataError
from duet_unlearn.urls import is_url, protocol_of, published_name, redact_url, visible

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "url",
    [
        "https://me:s3cr3t@host/a",
        "HTTPS://s3cr3t@host:8080/a",
        "http://me:p@s3cr3t@host/a",
        "http://me:p/s3cr3t@host/a",
        "http://me:p?s3cr3t@host/a",
        "http://me:p#s3cr3t@host/a",
        "s3://KEY:s3cr3t/with+signs@bucket/a",
        "https://host/a?X-Amz-Signature=s3cr3t",
        "https://host/a?token=x://s3cr3t",
        "https://host/a#s3cr3t",
        f"https://host/a?sig=s3cr3t@{DIGEST}",
        f"http://me:s3cr3t@host/a@{DIGEST}",
        "see 'https://me:s3cr3t@host/a?s3cr3t', and (http://s3cr3t@b) or https://c?s3cr3t",
    ],
)
def test_secrets_of_urls_are_never_shown(url: str) -> None:
    shown = redact_url(url)
    assert "s3cr3t" not in shown
    assert "me" not in shown
    assert shown.endswith(DIGEST) == url.endswith(DIGEST)


@pytest.mark.parametrize(
    "text",
    [
        f"hf://datasets/o/n@main/a@{DIGEST}",
        f"http://127.0.0.1:9/a/b@2@{DIGEST}",
        "https://[::1]:80/a@b",
        f"s3://bucket/a@{DIGEST}: not found (me@home); check 'a?b'",
        f"/home/a@b/c?@{DIGEST}",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_url(text) == text


def test_a_query_is_told_from_none() -> None:
    assert redact_url("https://me:x@host/a?b=c") == "https://host/a?..."
    assert redact_url("at https://host/a?...: no") == "at https://host/a?...: no"
    assert redact_url(f"https://host/a?b=c@{DIGEST}") == f"https://host/a?...@{DIGEST}"


def test_what_is_published_names_no_folder_of_this_machine() -> None:
    assert published_name(f"/home/me/caches/hp@{DIGEST}") == f"hp@{DIGEST}"
    assert published_name("~/caches/hp") == "hp"
    assert published_name("caches/hp") == "caches/hp"
    assert published_name("hub:/home/me/sets/hp:train") == "hub:hp:train"
    assert published_name("hub:org/hp:train") == "hub:org/hp:train"
    assert published_name(f"file:///home/me/caches/hp@{DIGEST}") == f"hp@{DIGEST}"
    assert published_name("org/model") == "org/model"
    assert published_name("https://me:x@host/hp") == "https://host/hp"


def test_urls_are_told_from_paths() -> None:
    assert is_url("s3://bucket/a")
    assert is_url("HTTPS://host/a")
    assert not is_url("folder/a@b")
    assert not is_url("C:/caches")
    assert (protocol_of("S3://bucket"), protocol_of("a/b")) == ("s3", "file")


def test_terminal_escapes_are_written_out() -> None:
    assert visible("a\x1b]0;title\x07b\nc  d\u202ee\x9b1m\udcff") == (
        "a\\x1b]0;title\\x07b\\nc  d\\u202ee\\x9b1m\\udcff"
    )
    assert visible("Düsseldorf, 東京, 🦊") == "Düsseldorf, 東京, 🦊"


def test_an_error_holds_no_secret_whoever_shows_it() -> None:
    assert (
        str(DataError("https://me:s3cr3t@host/a: no such file")) == "https://host/a: no such file"
    )
    pinned = f"hf://team/cache@{DIGEST}: another recipe"
    assert str(DataError(pinned)) == pinned
