"""A model from the hub: fetched into the hub's own cache, continued where it broke off.

Descriptions are left to huggingface_hub. Weights are fetched here: a model is a file of a gigabyte
or more, and huggingface_hub (2.4) throws half a file away when its process ends.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, tqdm

from .errors import UserError, reason
from .hub import cache_only_if_unreachable

DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, index of shards
WEIGHTS = ("model*.safetensors",)
NOT_OURS = ("*/*",)  # other formats lie in folders of their own
ATTEMPTS = 3  # in a row that bring nothing new
SECONDS = 15.0  # between two lines of progress


class Hidden(tqdm):
    """Bars that are not shown: huggingface_hub would show three for every look into its cache."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{name: value for name, value in options.items()
                                        if name != "name"} | {"disable": True})


def fetch_description(name: str, revision: str | None) -> Path:
    """The folder with a model's config and tokenizer, named after its commit.

    Args:
        name: on the hub.
        revision: a commit, branch or tag; None = the newest.

    Raises:
        UserError: it cannot be had; says why and what to do.
    """
    with _one_sentence(name, revision):
        return _snapshot(name, revision, DESCRIPTIONS)


def fetch_weights(name: str, commit: str, say: Callable[[str], None]) -> Path:
    """The folder with the weights too.

    Args:
        name, commit: the model and the name of the folder above.
        say: takes lines of progress, where huggingface_hub's bars are not shown.

    Raises:
        UserError: as above.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    with _one_sentence(name, commit):
        if not constants.HF_HUB_OFFLINE:
            for file in HfApi().list_repo_files(name, revision=commit):
                if any(fnmatch(file, pattern) for pattern in WEIGHTS) and "/" not in file and \
                        not isinstance(try_to_load_from_cache(name, file, revision=commit), str):
                    _fetch_file(name, commit, file, say)
        return _snapshot(name, commit, (*DESCRIPTIONS, *WEIGHTS))


def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns),
                                  ignore_patterns=list(NOT_OURS), tqdm_class=Hidden))


def _fetch_file(name: str, commit: str, file: str, say: Callable[[str], None]) -> None:
    """Puts a file where huggingface_hub's cache has it: `blobs/<etag>`."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    url = hf_hub_url(name, file, revision=commit)
    about = get_hf_file_metadata(url)
    if not about.size or not re.fullmatch("[0-9a-f]+", about.etag or ""):  # it becomes a file name
        return  # huggingface_hub fetches it, or says what is wrong with the answer
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")
    blobs.mkdir(parents=True, exist_ok=True)
    blob, part = blobs / about.etag, blobs / f"{about.etag}.part"
    with WeakFileLock(blobs / f"{about.etag}.lock"):  # runs side by side wait for the first
        if blob.exists():
            return
        shown = _Progress(f"{name} {file}", about.size, say)
        failures = 0
        while (size := part.stat().st_size if part.exists() else 0) < about.size:
            try:
                for total in _receive(url, part, size):
                    shown.at(total)
            except OSError:
                raise
            except Exception:  # connection lost, time-out: types of the hub's http library
                failures = 0 if part.exists() and part.stat().st_size > size else failures + 1
                if failures == ATTEMPTS:
                    raise
                time.sleep(1)
        shown.done()
        if not _is_right(part, about.size, about.etag):
            part.unlink()
            raise ValueError(f"{file} is damaged")
        os.replace(part, blob)


def _receive(url: str, part: Path, size: int) -> Iterator[int]:
    """Adds to a file what it lacks of an address; yields its size so far."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers() | ({"Range": f"bytes={size}-"} if size else {})
    # Plain bytes: a packed answer has another length, and half of it cannot be gone on with.
    with get_session().stream("GET", url, headers=headers | {"Accept-Encoding": "identity"},
                              follow_redirects=True,
                              timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        goes_on = answer.status_code == 206
        with part.open("ab" if goes_on else "wb") as stream:
            for block in answer.iter_bytes():
                stream.write(block)
                stream.flush()  # a killed process loses nothing that has come
                yield stream.tell()


def _is_right(path: Path, size: int, etag: str) -> bool:
    """Whether a file has the size and, where the hub names it, the checksum that it should have."""
    if path.stat().st_size != size:
        return False
    if not re.fullmatch("[0-9a-f]{64}", etag):
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == etag


class _Progress:
    """How far a file is: a bar of huggingface_hub where somebody watches, else a line at times."""

    def __init__(self, what: str, size: int, say: Callable[[str], None]):
        self.what, self.size, self.say, self.last = what, size, say, -SECONDS
        watched = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.bar = (tqdm(total=size, unit="B", unit_scale=True, desc=what)
                    if watched and not are_progress_bars_disabled() else None)

    def at(self, size: int) -> None:
        if self.bar is not None:
            self.bar.update(size - self.bar.n)
        elif time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            self.say(f"fetching {self.what}: {size / 1e6:,.1f} of {self.size / 1e6:,.1f} MB")

    def done(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self.say(f"fetched {self.what}, {self.size / 1e6:,.1f} MB")


@contextmanager
def _one_sentence(name: str, revision: str | None) -> Iterator[None]:
    """Turns what goes wrong inside into a sentence; without a hub only its cache is read."""
    from huggingface_hub import errors

    instead = "or set model.path to a local folder or GGUF file"
    with cache_only_if_unreachable() as unreachable:
        try:
            yield
        except errors.HFValidationError as error:
            raise UserError(f"There is no folder {name}, and it is no name on the hub, which looks "
                            "like owner/name; check model.path.") from error
        except errors.GatedRepoError as error:
            raise UserError(f"The model {name} is gated: accept its terms on its page on the hub, "
                            "then log in with 'hf auth login' or set HF_TOKEN, "
                            f"{instead}.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(f"The hub has no model {name} that you may read; check model.path, log "
                            f"in with 'hf auth login' if it is private, {instead}.") from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"The model {name} has no revision {revision} on the hub; check "
                            "model.revision.") from error
        except Exception as error:  # connection, proxy, full disk: types of several libraries
            if unreachable:
                raise UserError(f"The model {name} is not, or not whole, in the hub's cache, and "
                                f"the hub cannot be read ({unreachable}); go online, "
                                f"{instead}.") from error
            raise UserError(f"The model {name} could not be fetched from the hub "
                            f"({reason(error)}); run the same again, it goes on where it broke "
                            f"off, {instead}.") from error
