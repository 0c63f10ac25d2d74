"""What went wrong with a store, as one line that says what to do.

Every protocol has its own library and every library its own tree of errors, many outside OSError.
They are told apart by HTTP status and by class name, so that none of the libraries is imported.
"""

from collections.abc import Iterator

from duet_unlearn.errors import CacheError
from duet_unlearn.urls import redact_url

_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
# aiohttp, botocore, httpx and urllib3 in this order.
_PASSING_CLASSES = {
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
_REASON_LENGTH = 200


def is_missing(error: BaseException) -> bool:
    """Say whether an error means that a file is not there, its bucket or repository being there."""
    if _names(error) & {"NoSuchBucket", "RepositoryNotFoundError"}:
        return False
    return isinstance(error, FileNotFoundError | NotADirectoryError) or _status(error) == 404


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS
    names = _names(error)
    if names & {"OfflineModeIsEnabled", "InvalidURL"}:
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & _PASSING_CLASSES)


def explain(error: BaseException, where: str) -> CacheError:
    """Turn any error of a store into one line that says what to do."""
    names, status = _names(error), _status(error)
    reason = redact_url((str(error) or type(error).__name__).splitlines()[0])[:_REASON_LENGTH]
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
    else:
        problem = f"{type(error).__name__}: {reason}"
        if status is not None:
            problem = f"the server answers {status}"
        elif is_passing(error):
            problem = f"no connection ({reason})"
        advice = f"{problem}; check the URL"
        if status is None or is_passing(error):
            advice += " and the network, then run the same command again: what is finished is kept"
    return CacheError(f"{redact_url(where)}: {advice}")


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


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(4):
        if link is None:
            return
        yield link
        link = link.__cause__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _causes(error) for kind in type(link).__mro__}
