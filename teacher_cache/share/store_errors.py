"""What went wrong with a store, as one line that says what to do.

Every protocol has its own library and every library its own tree of errors, many outside OSError.
They are told apart by HTTP status and by class name, so that none of the libraries is imported.
"""

from collections.abc import Iterator

from duet_unlearn.errors import CacheError, first_line
from duet_unlearn.urls import redact_url

_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
# aiohttp, botocore, httpx and urllib3 in this order.
_PASSING_CLASSES = {
    *("ClientConnectionError", "ClientPayloadError"),
    *("HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "IncompleteReadError"),
    *("ResponseStreamingError", "TransportError", "ProtocolError"),
}
_NO_CREDENTIALS = (
    "no credentials that work; for s3:// set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY (a public bucket: FSSPEC_S3_ANON=true), for hf:// HF_TOKEN"
)
_ADVICE = {
    "NoSuchBucket": "no such bucket; create it first, or check the name and the endpoint",
    "RepositoryNotFoundError": "no such repository for this user; check the name and HF_TOKEN",
    **dict.fromkeys(
        (
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
            *("ProfileNotFound", "TokenRetrievalError", "UnauthorizedSSOTokenError"),
            "LocalTokenNotFoundError",
        ),
        _NO_CREDENTIALS,
    ),
}
_REASON_LENGTH = 200


def is_missing(error: BaseException) -> bool:
    """Say whether an error means that a file is not there, its bucket or repository being there."""
    if _names(error) & {"NoSuchBucket", "RepositoryNotFoundError"}:
        return False
    return isinstance(error, FileNotFoundError | NotADirectoryError) or _status(error) == 404


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later."""
    status, names = _status(error), _names(error)
    if status is not None:
        return status in _PASSING_STATUS
    passing = isinstance(error, ConnectionError | TimeoutError) or bool(names & _PASSING_CLASSES)
    return passing and not names & {"OfflineModeIsEnabled", "InvalidURL"}


def explain(error: BaseException, where: str) -> CacheError:
    """Turn any error of a store into one line that says what to do."""
    return CacheError(f"{redact_url(where)}: {_advice(error)}")


def _advice(error: BaseException) -> str:
    status = _status(error)
    for name in _names(error) & _ADVICE.keys():
        return _ADVICE[name]
    if status in (401, 403) or isinstance(error, PermissionError):
        code = f" ({status})" if status else ""
        return f"no permission{code}; check the credentials and what they may do there"
    if is_missing(error):
        return "not found; check the URL"
    if status is not None and not is_passing(error):
        return f"the server answers {status}; check the URL"
    reason = redact_url(first_line(error))[:_REASON_LENGTH]
    if status is not None:
        problem = f"the server answers {status}"
    elif is_passing(error):
        problem = f"no connection ({reason})"
    else:
        problem = f"{type(error).__name__}: {reason}"
    return (
        f"{problem}; check the URL and the network, then run the same command again: what is "
        "finished is kept"
    )


def _status(error: BaseException) -> int | None:
    for link in _causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # aiohttp; httpx and requests
            status = getattr(link, "status", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(4):
        if error is not None:
            yield error
            error = error.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _causes(error) for kind in type(link).__mro__}
