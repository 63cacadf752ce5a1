"""What the server takes at most. Beyond these it answers 413, 422, 429 or 507 and does no work."""

from __future__ import annotations

from ldm.errors import LdmError

MAX_BODY = 10**6  # bytes of a request without images
MAX_UPLOAD = 20 * 10**6  # bytes of a request with images
MAX_HELD = 160 << 20  # bytes of all bodies that are held at once
MAX_DRAINED, DRAIN_SECONDS = 64 << 20, 3  # bytes of a refused body that are read and forgotten
BODY_SECONDS = 60  # to receive a body in
MAX_QUEUED = 64  # jobs that wait
MAX_PER_ADDRESS = 4  # jobs that wait for one address of another machine
MAX_IMAGES = 64  # of one job
MAX_CELLS = 64  # of one grid
MAX_STEPS = 200
MAX_PIXELS = 2048 * 2048  # of one image
MAX_PROMPT = 8_000  # characters
MAX_LORAS = 8
JOB_SECONDS = 3600  # that one job may draw for
MAX_STREAMS = 32  # open event streams
FREE_BYTES = 200 << 20  # that must be free on the disk
KEPT_JOBS = 500  # finished jobs that the ledger remembers


class Refused(LdmError):
    """A request that is answered with this HTTP status."""

    def __init__(self, status: int, what: str, **options):
        super().__init__(what, **options)
        self.status = status
