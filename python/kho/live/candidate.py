"""`Candidate`: an image that another process may own, read by a process that may become its owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BusyError, NotOwnerError, StaleError
from .file.image import ImageFile
from .handle import Handle
from .reader import Reader

if TYPE_CHECKING:
    from .handover.predecessor import Predecessor

__all__ = ["Candidate"]


class Candidate(Reader):
    """An image as a successor sees it while its owner still has it: read-only, nothing of it is changed.

    What is read here is the generation that was committed when it was attached, whole, however often the owner commits:
    the owner keeps what a reader may see until the reader is closed and its last array is gone. Attach again to see a
    later one.
    """

    @classmethod
    def _of(cls, image: ImageFile) -> Candidate:
        """Read what an image has committed; on an error the image is closed. Raises: FormatError."""
        try:
            return cls(image, *image.pinned())
        except BaseException:
            image.close()
            raise

    def adopt(
        self, timeout: float = 0.0, *, version: str | None = None, predecessor: Predecessor | None = None
    ) -> Handle:
        """Become the owner, once the previous owner has released the image; the candidate is closed.

        If there was a commit since it was attached, the new generation is read. Memory that no generation refers to is
        freed.
        Args: timeout: seconds to wait for the owner. version: refuse another. predecessor: earlier owners that may
            still read.
        Raises: BusyError while another process is the owner: one of several candidates adopts; StaleError if the image
            was released; SchemaError; FormatError; AccessError if this process may not write it.
        """
        with self._lock:
            image = self._image
            if image.lock_fd < 0:
                raise NotOwnerError(f"{image.where}: this candidate is closed, or another process's")
            image.make_writable()
            image.lock(timeout)
            try:
                if not image.still_there():
                    raise StaleError(f"{image.where}: another process has released it")
                if predecessor is not None and predecessor.owner != image.owner():
                    raise BusyError(f"{image.where}: another process has become its owner at this moment")
                self._state = image.committed()
                self._check_schema(None, version)
                handle = Handle(image, self._state, inherited=True, predecessor=predecessor)
            except BaseException:
                image.unlock()
                raise
            self._image = _Closed(image)
            self._unmap()
            return handle


class _Closed(ImageFile):
    """What stands for a candidate's image once a handle has it: its name and head, without descriptors."""

    def __init__(self, image: ImageFile) -> None:
        self.fd = self.lock_fd = -1
        self.session = None
        self.where = image.where
        self.path = image.path
        self.kept = image.kept
        self.sup = image.sup
        self.head = image.head
