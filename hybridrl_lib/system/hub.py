"""The hub: whether it can be read, and what to do where it cannot.

Without a connection the hub's own libraries try again for a minute a file before they give up, or
before they look into their cache. One question with a short time limit comes first.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 3.0
YES = ("1", "true", "yes", "on")


def hub_problem(seconds: float = SECONDS) -> str:
    """Why the hub cannot be read within the time limit, and what to do; empty if it can."""
    problem = why_unreachable(seconds)
    return f"{problem}; use a model folder and a data folder" if problem else ""


def why_unreachable(seconds: float = SECONDS) -> str:
    """Why the hub cannot be read within the time limit; empty if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in YES:
        return "HF_HUB_OFFLINE is set: only what is in the hub's cache can be used"
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    answers = []

    # A thread, because a client's time limit does not hold for looking up the host's name.
    asking = threading.Thread(target=lambda: answers.append(ask(endpoint, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    problem = answers[0] if answers else f"no answer within {seconds:g} s"
    return f"{endpoint}: {problem}" if problem else ""


def ask(endpoint: str, seconds: float) -> str:
    """What is wrong with an address; empty if it answers, whatever it says short of an error of
    its own. The hub's client asks, since proxies and certificates are then as in a download."""
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(endpoint, timeout=seconds).status_code
    except Exception as error:  # no connection, no name, a bad address: types of several libraries
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"status {status}" if status >= 500 else ""


@contextmanager
def cache_only_if_unreachable() -> Iterator[str]:
    """Inside, only the hub's cache is read if the hub does not answer; then nothing is waited for.

    Gives the `with` block the reason; empty if the hub is read.
    """
    from huggingface_hub import constants

    before, problem = constants.HF_HUB_OFFLINE, why_unreachable()
    constants.HF_HUB_OFFLINE = before or bool(problem)
    try:
        yield problem
    finally:
        constants.HF_HUB_OFFLINE = before


def in_hub_cache(name: str, revision: str | None = None) -> bool:
    """Whether config and weights of a hub model were fetched before."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config, whole, shards = (
            isinstance(try_to_load_from_cache(name, part, revision=revision), str)
            for part in ("config.json", "model.safetensors", "model.safetensors.index.json"))
        return config and (whole or shards)
    except ValueError:  # not a hub name
        return False
