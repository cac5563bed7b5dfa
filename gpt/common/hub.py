"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies


def go_offline_if_unreachable() -> bool:
    """Let `huggingface_hub` use only its cache if the hub does not answer, instead of half a minute
    of retries. Returns whether it is offline."""
    from huggingface_hub import constants

    if reachable():
        return False
    constants.HF_HUB_OFFLINE = True
    return True


def reachable(timeout: float = 0.5) -> bool:
    """Whether the hub answers within `timeout` seconds; true if a proxy is configured."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    if address.scheme in getproxies():
        return True
    port = address.port or (443 if address.scheme == "https" else 80)
    answered: list[bool] = []

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((address.hostname or "", port), timeout).close()
            answered.append(True)

    thread = Thread(target=connect, daemon=True)  # a name lookup has no timeout
    thread.start()
    thread.join(timeout)
    return bool(answered)
