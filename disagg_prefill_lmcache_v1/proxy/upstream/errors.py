"""What can go wrong between the proxy and a server."""

from __future__ import annotations

import errno

# The proxy's own shortage: of descriptors, local ports or memory.
_OWN_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))


class UpstreamError(Exception):
    """An exchange with a server failed.

    ``kind`` is refused (nobody takes the connection), unreachable (no connection in time), timeout (no answer in time),
     lost (the connection ended), protocol (the answer is not HTTP/1.1),
    client_stalled (the client did not read for too long) or exhausted (the proxy itself has no descriptor or port
    left). ``taken`` tells whether the server may have taken any of the request: only if not, may it be sent again.
    """

    def __init__(self, kind: str, message: str, *, taken: bool = True) -> None:
        super().__init__(message)
        self.kind = kind
        self.taken = taken


def connect_error(error: OSError) -> UpstreamError:
    """The error for a connection that could not be made."""
    if error.errno in _OWN_SHORTAGE:
        return UpstreamError("exhausted", f"the proxy cannot open a connection: {error.strerror}", taken=False)
    return UpstreamError("refused", f"connection refused: {error}", taken=False)
