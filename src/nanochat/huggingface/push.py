"""An export in a repository of the hub, through `huggingface_hub`; private unless told otherwise."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.data.hub import DEFAULT_ENDPOINT
from nanochat.huggingface.config import ExportError
from nanochat.huggingface.export import CARD, RECORD, read_export
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where an export is now."""

    url: str
    commit: str
    private: bool


def push_export(folder: Path, repo: str, *, public: bool = False) -> Pushed:
    """Upload the export in `folder` to the model repository `repo` in one commit; it is made if it is not
    there. What else the repository holds stays.

    ``HF_ENDPOINT`` and ``HF_TOKEN`` are respected. Raises ExportError for a folder that is no finished
    export, a repository that is public though `public` is not said, and whatever the hub refuses.
    """
    record = read_export(folder)
    import httpx
    from huggingface_hub import HfApi, errors

    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint)
    names = [*(file.name for file in record.files), CARD, RECORD]
    try:
        return _push(api, folder, repo, names, record.model, record.stage, public=public)
    except ExportError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise ExportError(f"{repo} was not pushed: HF_HUB_OFFLINE is set. Unset it") from error
    except errors.HFValidationError as error:
        raise ExportError(f"{repo!r} is no name of a repository: write owner/name") from error
    except errors.HfHubHTTPError as error:
        raise ExportError(f"{repo} was not pushed: {_reason(error, endpoint)}") from error
    except ValueError as error:  # how metadata of a card that the hub does not take are reported
        raise ExportError(f"{repo} was not pushed: {' '.join(str(error).split())}") from error
    except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: how a failed transfer is reported
        cause = error.__cause__ or error
        raise ExportError(
            f"{repo} was not pushed: {endpoint} cannot be reached ({type(cause).__name__}: {cause}). Check "
            "the network and HF_ENDPOINT, and push it again"
        ) from error


def _push(
    api: HfApi, folder: Path, repo: str, names: list[str], model: str, stage: str, *, public: bool
) -> Pushed:
    api.create_repo(repo, private=not public, exist_ok=True)
    private = bool(api.model_info(repo).private)
    if not private and not public:
        raise ExportError(
            f"{repo} is there already and is public: push with --public, or to another repository"
        )
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=names,
        # The template of a chat model that was here before would make a base model chat.
        delete_patterns=None if CHAT_TEMPLATE in names else CHAT_TEMPLATE,
        commit_message=f"{model}, stage {stage}",
    )
    return Pushed(url=f"{api.endpoint}/{repo}", commit=commit.oid, private=private)


def _reason(error: Exception, endpoint: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "a call without HF_TOKEN"
        return f"{endpoint} refuses {token} ({status}). Set HF_TOKEN to a token that may write to it"
    return f"{endpoint} answered {' '.join(str(error).split())[:300]}"
