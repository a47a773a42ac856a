"""What a server is told: where it listens, who may ask, and what a request may cost."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from codetr.errors import UserError

LEAST_TOKEN = 16  # characters
_COUNTS = ("batch_size", "readers", "max_bytes", "max_pixels", "max_requests")
_NUMBERS = {"score_threshold": 0, "batch_wait": 0, "read_seconds": 0.1, "answer_seconds": 0.1}
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """host: address to listen on. token: what requests have to bring; None: nothing, on this machine alone.

    score_threshold: of requests that name none.
    batch_size: images that the network sees at once.
    batch_wait: seconds that an image waits for others, at most, while some are on their way.
    readers: threads that decode images.
    max_bytes: of a request. max_pixels: of an image, by its header.
    max_requests: that are read, wait and are computed at one time; more are refused.
    read_seconds: in which a request has to be here. answer_seconds: in which it is answered from then on, or refused.

    Raises UserError for numbers that are none, and for a server that others can reach without a token.
    """

    host: str
    token: str | None
    score_threshold: float
    batch_size: int
    batch_wait: float
    readers: int
    max_bytes: int
    max_pixels: int
    max_requests: int
    read_seconds: float
    answer_seconds: float

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"{name}={value}: must be a whole number, 1 or more")
        for name, least in _NUMBERS.items():
            if type(value := getattr(self, name)) not in (int, float) or not value >= least:
                raise UserError(f"{name}={value}: must be a number, {least} or more")
        if self.score_threshold > 1:
            raise UserError(f"score_threshold={self.score_threshold}: must be from 0 to 1")
        if self.token is None and not is_local(self.host):
            raise UserError(
                f"host={self.host}: others can reach this address, so that a token is needed: "
                'CODETR_TOKEN=$(python -c "import secrets; print(secrets.token_urlsafe())") in the environment, or '
                "token=...; host=127.0.0.1 is for this machine alone"
            )
        if self.token is not None and len(self.token) < LEAST_TOKEN:
            raise UserError(
                f"token: it has {len(self.token)} characters, and can be guessed; take {LEAST_TOKEN} or more"
            )

    @property
    def names(self) -> list[str]:
        """What requests may call this server: without a token only this machine's own names, so that no page of the
        web reaches it under a name that leads here."""
        return ["*"] if self.token is not None else [*_LOOPBACK, self.host]


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
