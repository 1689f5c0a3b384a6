"""Failures of the Hub, each as one line and a hint. No other module reads the errors of the Hub's client."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
from typing import TYPE_CHECKING, TypeVar

from chanfmt.base.errors import ChanfmtError, UsageError, first_line
from chanfmt.base.narrate import bars_shown, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

ATTEMPTS = 4
LONGEST_WAIT = 60.0
"""Longest wait, in seconds, that the Hub may ask for. If it asks for more, the user decides."""
_AGAIN = "run the same command again; it does not repeat finished uploads"
# The client repeats these requests itself: uploads, and the requests that prepare them.
_TRIED_BY_CLIENT = re.compile(r"/preupload/|/lfs/objects/batch|/tree/")


class HubError(ChanfmtError):
    """A request to the Hub failed."""


@contextlib.contextmanager
def hub_errors(repo: str, *, kind: str = "model", revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn every exception of the Hub's client in the body into a `ChanfmtError`.

    Args:
        repo: The repository, for the message.
        kind: ``model`` or ``dataset``.
        revision: Branch, tag or commit that was asked for; None is the main branch.
        writing: The request would have changed the repository.
    """
    try:
        yield
    except ChanfmtError:
        raise
    except Exception as error:
        raise _translated(error, repo, kind, revision, writing=writing) from None


def _translated(error: BaseException, repo: str, kind: str, revision: str | None, *, writing: bool) -> ChanfmtError:
    """The error to report for ``error``, which the client raised."""
    from huggingface_hub import constants, errors

    error = _cause(error)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    what = "data set" if kind == "dataset" else "model"
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo!r} cannot be the name of a repository", hint="write USER/NAME")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return no_token()
    if isinstance(error, errors.OfflineModeIsEnabled):
        if writing:
            return HubError("HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE, and run the same command again")
        return HubError(
            f"HF_HUB_OFFLINE is set, and {repo} is not in the cache",
            hint=f"unset HF_HUB_OFFLINE and run the same command again, or run: {_download(repo, kind, revision)}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no branch, tag or commit {revision!r}", hint=f"see: {page}/commits/main")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(
            f"{repo} is not in the cache, or not all of it is", hint=f"download it with: {_download(repo, kind, revision)}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{repo} has no such file", hint=f"see: {page}/tree/main")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(
            f"no space is left for the Hub cache in {constants.HF_HOME}",
            hint="free some space, or set HF_HOME to another directory",
        )
    # Errors of the network name no file.
    if isinstance(error, OSError) and error.filename is not None and _is_cached(error.filename):
        return HubError(
            f"the Hub cache in {constants.HF_HOME} cannot be used: {error.filename}: {error.strerror}",
            hint="make it a directory that you can write, or set HF_HOME to another directory",
        )
    if status := _status(error):
        return _by_status(error, status, repo, what, page, writing=writing)
    # The token has characters that cannot be sent.
    if isinstance(error, UnicodeError) or type(error).__name__ == "LocalProtocolError":
        return bad_token()
    if is_unreachable(error):
        hint = _AGAIN if writing else f"check the network; on a machine with a network, run: {_download(repo, kind, revision)}"
        return HubError(f"the Hub cannot be reached at {constants.ENDPOINT} ({type(error).__name__})", hint=hint)
    return HubError(
        f"the Hub client failed on {repo}: {without_secrets(first_line(error))}",
        hint=_AGAIN if writing else "run the same command again",
    )


def _by_status(error: BaseException, status: int, repo: str, what: str, page: str, *, writing: bool) -> ChanfmtError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        login = ", then run: hf auth login" if status == 401 else ""
        return HubError(f"{repo} is gated", hint=f"request access at {page}{login}")
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"the Hub has disabled {repo}", hint=f"see: {page}")
    if isinstance(error, errors.RepositoryNotFoundError):
        if status == 401:
            return HubError(
                f"the Hub shows no {what} {repo} without a token", hint="check the name, or log in with: hf auth login"
            )
        return HubError(f"the Hub shows you no {what} {repo}", hint="check the name, or ask its owner for access")
    if status == 401:
        return bad_token()
    if status == 402:
        return HubError(f"the Hub wants payment to store more in {repo}", hint="free private storage, or add --public")
    if status == 403:
        if writing:
            return HubError(
                f"you may not write to {repo}",
                hint="use a token with write access (hf auth login), ask the owner "
                "for access, name a repository of yours, or propose the change with --pr",
            )
        return HubError(f"you may not read {repo}", hint=f"request access at {page}")
    if status == 404:
        return HubError(f"the Hub has nothing at {repo}", hint="check the name")
    if status in (409, 412):
        return HubError(f"{repo} is being changed by someone else", hint="run the same command again")
    if status == 429:
        wait = _asked_wait(error)
        when = f"in {wait:.0f} s " if wait else ""
        return HubError(
            "the Hub asks for fewer requests",
            hint=f"run the same command again {when}".rstrip() + ("; it does not repeat finished uploads" if writing else ""),
        )
    if status >= 500:
        return HubError(f"the Hub failed with status {status}", hint=_AGAIN if writing else "run the same command again later")
    said = getattr(error, "server_message", None) or str(error)
    return HubError(f"the Hub refused {repo} with status {status}: {without_secrets(said.splitlines()[0])}")


def no_token() -> HubError:
    """The error if nobody is logged in."""
    return HubError("the Hub needs to know who you are", hint="log in with: hf auth login")


def bad_token() -> HubError:
    """The error if the Hub does not know the user's token."""
    which = "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the stored token"
    return HubError(
        f"the Hub does not accept your token ({which})",
        hint="log in with: hf auth login" + (", and unset HF_TOKEN" if os.environ.get("HF_TOKEN") else ""),
    )


def stored_token() -> str | None:
    """The user's token; None if there is none, or if it cannot be read."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except OSError:
        return None


def _is_cached(name: object) -> bool:
    """Whether the file ``name`` belongs to the client, and not to the user."""
    from huggingface_hub import constants

    if not isinstance(name, str | bytes | os.PathLike):
        return False
    path = os.path.abspath(os.fsdecode(name))
    places = map(os.path.abspath, (constants.HF_HOME, constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH))
    # A missing directory above the cache is named too.
    return any(os.path.commonpath([path, place]) in (path, place) for place in places)


def without_secrets(text: str) -> str:
    """``text`` without the user's token, and without anything that looks like a token."""
    token = stored_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9_]{6,}", "***", text)


def retried(call: Callable[[], Result], *, safe: bool = True) -> Result:
    """Return ``call()``. Repeat it after a failure that may pass, unless the client has repeated it already.

    Args:
        safe: The call may be repeated: doing it twice does no harm.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None or not safe or attempt == ATTEMPTS - 1:
                raise
            say(f"the Hub is not ready; trying again in {wait:.0f} s")
        time.sleep(wait)
    raise AssertionError


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None if ``error`` will not pass, or if the client has waited already."""
    from huggingface_hub import errors

    request = None
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code not in (408, 409, 429) and error.response.status_code < 500:
            return None
    # Other errors come from Xet's client, which has repeated the request itself.
    elif not isinstance(error, errors.HTTPError) or type(error).__name__ in ("ConnectError", "LocalProtocolError"):
        return None
    with contextlib.suppress(RuntimeError, AttributeError):  # An error of the connection may not hold its request.
        request = error.request
    if request is not None and (request.method == "PUT" or _TRIED_BY_CLIENT.search(str(request.url))):
        return None
    asked = _asked_wait(error)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    return float(2**attempt)


def _asked_wait(error: BaseException) -> float | None:
    """Seconds that the response asks us to wait, in ``Retry-After`` or in the Hub's ``RateLimit``; None if it does not ask."""
    response = getattr(error, "response", None)
    if response is None:
        return None
    stated = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    text = response.headers.get("Retry-After", "") or (stated[1] if stated else "")
    return float(text) if text.isdigit() else None


def _status(error: BaseException) -> int:
    """HTTP status of the response behind ``error``; 0 if there was no response."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return int(error.response.status_code)
    # Xet's client gives the status only in its message.
    match = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return int(match[1]) if match else 0


def is_unreachable(error: BaseException) -> bool:
    """Whether ``error`` says that the Hub cannot be reached, or must not be (offline mode)."""
    from huggingface_hub import errors

    kinds = errors.HTTPError | ConnectionError | TimeoutError
    return isinstance(error, kinds) and not isinstance(error, errors.HfHubHTTPError)


def _cause(error: BaseException) -> BaseException:
    """The first cause of ``error``: some errors only say in which step another error happened."""
    from huggingface_hub import errors

    while error.__cause__ is not None and (type(error) is RuntimeError or isinstance(error, errors.LocalEntryNotFoundError)):
        error = error.__cause__
    return error


def _download(repo: str, kind: str, revision: str | None) -> str:
    return (
        f"hf download {repo}"
        + (" --repo-type dataset" if kind == "dataset" else "")
        + (f" --revision {revision}" if revision else "")
    )


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Turn the client's log lines into notes, and show its progress bars only if ours are shown.

    Only lines without addresses pass: an address may be signed, and give access to whoever reads it.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Notes()], False
    disabled = are_progress_bars_disabled()
    progress = bars_shown()
    if not progress:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if not progress and not disabled:
            enable_progress_bars()


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith(("Retrying", "Rate limited")):
            say(f"the Hub is not ready: {text[:1].lower()}{text[1:]}")
