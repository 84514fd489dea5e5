"""Base class of objects that own descriptors and a lock and must not be copied."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import NotCopyableError

__all__ = ["Uncopied"]


class Uncopied:
    """Refuses copy.copy, copy.deepcopy and pickle: a copy would close the descriptors of the original."""

    _instead = "pass the object itself to a thread, and open the image by its name or path in another process"

    def _uncopied(self, how: str) -> NoReturn:
        kind = type(self)
        raise NotCopyableError(
            f"{kind.__module__}.{kind.__qualname__}: cannot {how}: it owns descriptors and a lock, which a copy would "
            f"close; {self._instead}"
        )

    def __copy__(self) -> NoReturn:
        """Refuse. Raises: NotCopyableError."""
        self._uncopied("be copied")

    def __deepcopy__(self, memo: object) -> NoReturn:
        """Refuse. Raises: NotCopyableError."""
        self._uncopied("be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse. Raises: NotCopyableError."""
        self._uncopied("be pickled")
