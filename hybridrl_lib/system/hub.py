"""The Hugging Face hub: whether it can be read, and models from it, through its cache.

Without a connection the hub's libraries retry every file for a minute. So one request with a short
time limit comes first.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, reason

SECONDS = 3.0
YES = ("1", "true", "yes", "on")
DESCRIPTIONS = ("*.json", "*.txt", "*.model", "*.jinja")  # config, tokenizer, index of shards
WEIGHTS = ("model*.safetensors",)
NOT_OURS = ("*/*",)  # other formats have their own folders


# Whether it can be read --------------------------------------------------------------------------


def hub_problem(seconds: float = SECONDS) -> str:
    """Why the hub cannot be read within the time limit, and what to do; empty if it can."""
    problem = why_unreachable(seconds)
    return f"{problem}; use a model folder and a data folder" if problem else ""


def why_unreachable(seconds: float = SECONDS) -> str:
    """Why the hub cannot be read within the time limit; empty if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in YES:
        return "HF_HUB_OFFLINE is set: only the hub's cache can be used"
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    answers = []

    # A thread, because a client's time limit does not cover resolving the host name.
    asking = threading.Thread(target=lambda: answers.append(ask(endpoint, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    problem = answers[0] if answers else f"no answer within {seconds:g} s"
    return f"{endpoint}: {problem}" if problem else ""


def ask(endpoint: str, seconds: float) -> str:
    """What is wrong with an address; empty if it answers with any status below 500.

    The hub's client sends the request, so that proxies and certificates are those of a download.
    """
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(endpoint, timeout=seconds).status_code
    except Exception as error:  # no connection, no name, a bad address: types of several libraries
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"status {status}" if status >= 500 else ""


@contextmanager
def cache_only_if_unreachable() -> Iterator[str]:
    """Inside the `with` block, only the hub's cache is read if the hub does not answer.

    Yields the reason; empty if the hub is read.
    """
    from huggingface_hub import constants

    before, problem = constants.HF_HUB_OFFLINE, why_unreachable()
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def in_hub_cache(name: str, revision: str | None = None) -> bool:
    """Whether config and weights of a hub model are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config, whole, shards = (
            isinstance(try_to_load_from_cache(name, part, revision=revision), str)
            for part in ("config.json", "model.safetensors", "model.safetensors.index.json"))
        return config and (whole or shards)
    except ValueError:  # not a hub name
        return False


# Models ------------------------------------------------------------------------------------------


def fetch_description(name: str, revision: str | None) -> Path:
    """The folder with a model's config and tokenizer, named after its commit.

    Args:
        name: on the hub.
        revision: a commit, branch, or tag; None = the newest.

    Raises:
        UserError: it is not available; says why and what to do.
    """
    return _fetch(name, revision, DESCRIPTIONS)


def fetch_weights(name: str, commit: str) -> Path:
    """The same folder with the weights.

    Args:
        name, commit: the model, and the name of its folder.

    Raises:
        UserError: as above.
    """
    return _fetch(name, commit, (*DESCRIPTIONS, *WEIGHTS))


def _fetch(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    instead = "or set model.path to a local folder or GGUF file"
    with cache_only_if_unreachable() as unreachable:
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns),
                                          ignore_patterns=list(NOT_OURS)))
        except errors.HFValidationError as error:
            raise UserError(f"There is no folder {name}, and it is not a hub name, which looks "
                            "like owner/name; check model.path.") from error
        except errors.GatedRepoError as error:
            raise UserError(f"The model {name} is gated: accept its terms on its hub page, then "
                            f"log in with 'hf auth login' or set HF_TOKEN, {instead}.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(f"The hub has no model {name} that you may read; check model.path, log "
                            f"in with 'hf auth login' if it is private, {instead}.") from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"The model {name} has no revision {revision} on the hub; check "
                            "model.revision.") from error
        except Exception as error:  # connection, proxy, full disk: types of several libraries
            if unreachable:
                raise UserError(f"The model {name} is not completely in the hub's cache, and the "
                                f"hub cannot be read ({unreachable}); go online, {instead}."
                                ) from error
            raise UserError(f"The model {name} could not be downloaded from the hub "
                            f"({reason(error)}); run the same command again, {instead}.") from error
