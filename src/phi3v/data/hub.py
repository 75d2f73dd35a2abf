"""Data sets on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from phi3v.base.errors import InputError


def download(repository: str, *patterns: str, flag: str = "--data-dir") -> Path:
    """The local copy of some files of a data set on the Hub, downloaded if need be; `flag` names it otherwise."""
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # no network, no access
        reason = str(error).strip().partition("\n")[0]
        message = f"{repository} cannot be read from the Hub ({reason}): name its folder with {flag}"
        raise InputError(message) from error
