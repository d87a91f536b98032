"""A request that is refused before it is looked at, with the HTTP status that says so. Knows no routes."""

from contracts.errors import Refused


class Turned(Exception):
    """How it reads in the body is the route's to say."""

    def __init__(self, status: int, refusal: Refused, headers: dict[str, str] | None = None) -> None:
        super().__init__(str(refusal))
        self.status = status
        self.refusal = refusal
        self.headers = headers
