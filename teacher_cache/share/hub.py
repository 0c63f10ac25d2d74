"""Push to the hub: everything in one commit of a dataset repository.

fsspec would make one commit a file, which the hub limits by the hour. One commit is also atomic,
and its large files are sent in parallel and skipped where the hub has them, by the hub's client.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from duet_unlearn.errors import CacheError
from duet_unlearn.teacher_cache.share.remote_errors import explain, with_retries

_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubPlace:
    """A folder in a dataset repository of the hub."""

    url: str
    repository: str
    revision: str | None
    folder: str

    @classmethod
    def parse(cls, url: str) -> "HubPlace":
        """Take `hf://datasets/ORG/NAME[@REVISION][/FOLDER]` apart.

        Raises:
            CacheError: The URL has another form.
        """
        match = _URL.fullmatch(url)
        if match is None:
            raise CacheError(f"{url}: expected hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        repository, revision, folder = match.groups()
        return cls(url=url, repository=repository, revision=revision, folder=folder or "")

    def create_repository(self) -> None:
        """Create the repository where there is none; a new one is private.

        A cache holds the queries that are to be forgotten, so its owner decides who sees it.

        Raises:
            CacheError: The hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        self._ask(
            lambda: HfApi().create_repo(
                self.repository, repo_type="dataset", private=True, exist_ok=True
            )
        )

    def commit(self, files: Sequence[tuple[Path, str]], message: str) -> None:
        """Add local files under their names, all of them or none.

        Raises:
            CacheError: The hub refuses, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        def attempt() -> None:
            # An operation remembers what was sent of it, so each attempt gets new ones.
            operations = [
                CommitOperationAdd(
                    path_in_repo=f"{self.folder}/{name}" if self.folder else name,
                    path_or_fileobj=path,
                )
                for path, name in files
            ]
            HfApi().create_commit(
                self.repository,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self.revision,
            )

        self._ask(attempt)

    def _ask(self, action: Callable[[], object]) -> None:
        try:
            with_retries(action, self.url)
        except FileNotFoundError as error:
            raise explain(error.__cause__ or error, self.url) from error
