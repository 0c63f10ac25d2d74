"""What went wrong with a store: worth another try, or one line that says what to do.

Every protocol has its own library and every library its own tree of errors, many outside OSError.
They are told apart by HTTP status and by class name, so that none of the libraries is imported.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from duet_unlearn.errors import CacheError, DuetError
from duet_unlearn.teacher_cache.share.location import hide_credentials

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
# aiohttp, botocore, httpx and urllib3 in this order.
_TRANSIENT_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "EndpointConnectionError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "TransportError",
    "ProtocolError",
}
_CREDENTIAL_CLASSES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "LocalTokenNotFoundError",
}
_AGAIN = "run the same command again: what is finished is kept"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error stands for, or None."""
    for link in _causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # aiohttp; httpx and requests
            status = getattr(link, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_missing(error: BaseException) -> bool:
    """Say whether an error means that a file is not there, its bucket or repository being there."""
    if _names(error) & {"NoSuchBucket", "RepositoryNotFoundError"}:
        return False
    return isinstance(error, FileNotFoundError | NotADirectoryError) or status_of(error) == 404


def is_transient(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    names = _names(error)
    if "OfflineModeIsEnabled" in names or "InvalidURL" in names:
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & _TRANSIENT_CLASSES)


def explain(error: BaseException, url: str) -> CacheError:
    """Turn any error of a store into one line that says what to do."""
    names, status = _names(error), status_of(error)
    reason = hide_credentials((str(error) or type(error).__name__).splitlines()[0][:200])
    if names & _CREDENTIAL_CLASSES:
        advice = (
            f"no credentials ({reason}); for s3:// set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (a public bucket: FSSPEC_S3_ANON=true), for hf:// HF_TOKEN"
        )
    elif "NoSuchBucket" in names:
        advice = "no such bucket; create it first, or check the name and the endpoint"
    elif "RepositoryNotFoundError" in names:
        advice = "no such repository for this user; check the name and HF_TOKEN"
    elif status in (401, 403) or isinstance(error, PermissionError):
        code = f" ({status})" if status else ""
        advice = f"no permission{code}; check the credentials and what they may do there"
    elif is_missing(error):
        advice = "not found; check the URL"
    elif is_transient(error):
        problem = f"the server answers {status}" if status else f"no connection ({reason})"
        advice = f"{problem}; check the address and the network, then {_AGAIN}"
    elif status is not None:
        advice = f"the server answers {status}; check the URL"
    else:
        advice = f"{type(error).__name__}: {reason}; check the URL, then {_AGAIN}"
    return CacheError(f"{hide_credentials(url)}: {advice}")


def with_retries(action: Callable[[], T], url: str) -> T:
    """Run an action on a store; try again, ever later, while its errors may pass.

    Raises:
        FileNotFoundError: The file is not there.
        CacheError: It failed for good; the message is one line.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except DuetError:
            raise
        except Exception as error:
            if is_missing(error):
                raise FileNotFoundError(url) from error
            if attempt == ATTEMPTS - 1 or not is_transient(error):
                raise explain(error, url) from error
            pause(attempt, error, url)
    raise AssertionError("unreachable: the last attempt returns or raises")


def pause(attempt: int, error: BaseException, url: str) -> None:
    """Wait before attempt `attempt + 1`; apart by chance, so that clients do not return at once."""
    seconds = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS)
    seconds *= random.uniform(0.75, 1.25)
    logger.debug(
        "%s: %s, trying again in %.1f s", hide_credentials(url), type(error).__name__, seconds
    )
    time.sleep(seconds)


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(4):
        if link is None:
            return
        yield link
        link = link.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _causes(error) for kind in type(link).__mro__}
