"""A folder in a dataset repository of the hub, moved by the hub's own client.

A push is one commit: fsspec would make one a file, which the hub limits by the hour. It is atomic,
and its large files are sent in parallel and skipped where the hub has them.
"""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duet_unlearn.errors import CacheError

_URL = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFolder:
    """`hf://datasets/ORG/NAME[@REVISION][/FOLDER]`."""

    repository: str
    revision: str | None
    folder: str

    @classmethod
    def parse(cls, url: str) -> "HubFolder":
        """Take a URL apart.

        Raises:
            CacheError: It has another form.
        """
        match = _URL.fullmatch(url)
        if match is None:
            raise CacheError(f"{url}: expected hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        repository, revision, folder = match.groups()
        return cls(repository=repository, revision=revision, folder=folder or "")

    def create_repository(self) -> None:
        """Create the repository where there is none; a new one is private.

        A cache holds the queries that are to be forgotten, so its owner decides who sees it.
        """
        from huggingface_hub import HfApi

        HfApi().create_repo(self.repository, repo_type="dataset", private=True, exist_ok=True)

    def commit(self, folder: Path, names: Sequence[str], message: str) -> None:
        """Add files of a local folder under their names, all of them or none."""
        from huggingface_hub import CommitOperationAdd, HfApi

        HfApi().create_commit(
            self.repository,
            [
                CommitOperationAdd(path_in_repo=self._path(name), path_or_fileobj=folder / name)
                for name in names
            ],
            commit_message=message,
            repo_type="dataset",
            revision=self.revision,
        )

    def get(self, name: str, to: Path) -> None:
        """Bring a file to a local path, resumed by the client after a cut."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # the bar over all files is ours
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=".hub-") as folder:
            path = hf_hub_download(
                self.repository,
                self._path(name),
                repo_type="dataset",
                revision=self.revision,
                local_dir=folder,
            )
            Path(path).replace(to)

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name
