"""Weights of a safetensors file, which the first start reads into an image, and every later start attaches.

    >>> weights = kho.live.safetensors.load("model.safetensors")
    >>> weights["embed.weight"]  # a read-only numpy array, where the first process put it
    >>> torch.from_numpy(weights["embed.weight"]).view(torch.bfloat16)  # zero-copy; see weights.dtypes

Tensors are read directly into image memory, one after the other, so there is never a second copy. An image has no owner
once it is filled, so any number of processes attach at the same time; of those that start while it is being filled, one
fills it and the others wait. A changed file (`Identity`) gets a new image, which replaces the old one; processes that
read the old image keep it. If only its times have changed, the file is compared with its image, and keeps it. All names
of a file, by links or other paths, lead to one image.

`load` keeps the image as a file on tmpfs. `load_into` fills an image that a service owns already, with any transport.

The header is read by the `safetensors` library (`pip install kho[live]`), which refuses a header that is truncated, too
large, not JSON, or whose tensors overlap, leave holes or do not fit the file. For dtypes that numpy does not have,
`RAW` has the dtypes of the arrays, and `Tensors.dtypes` those of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from ..errors import BusyError, FormatError, KhoError, ParameterError, SourceError, StaleError, UntrustedError
from ..formats.live import MOST_DIMENSIONS, MOST_NAME, PAGE
from .deadline import Deadline
from .file import memory
from .file.space import ALIGN
from .file.trust import Trust, path_of, private_directory, same_file
from .handle import Handle
from .opening import attach, open_at
from .oserrors import error_of
from .reader import Reader

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPES", "RAW", "Identity", "Tensors", "load", "load_into", "place_of", "release"]

DTYPES = {
    "BOOL": "|b1",
    "I8": "|i1",
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "C64": "<c8",
}
"""Dtypes of the format that numpy has."""
RAW = {
    "BF16": "<u2",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "F8_E8M0": "|u1",
    "F8_E4M3FNUZ": "|u1",
    "F8_E5M2FNUZ": "|u1",
}
"""Dtypes that numpy does not have, and those of their arrays: `.view(ml_dtypes.bfloat16)` converts these."""
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Dtypes with elements of less than a byte, and their bits: the arrays are one-dimensional `|u1`, the file's bytes."""

PLACE = "/dev/shm/kho-live-{uid}"
INDEX = "__metadata__"
"""The object that describes the file and its tensors; the format reserves the name, so no tensor has it."""
VERSION = "safetensors-1"
MOST_HEADER = 64 << 20
MOST_TENSORS = 1 << 18
CHUNK = 64 << 20
"""Bytes of one read."""
WAIT = 3600.0
"""Seconds to wait for a process that is filling the image."""
ROOM = 64 << 20
"""Bytes of an image beyond its tensors."""
POLL = 0.01
"""Seconds between two attempts when another process removes the image or its directory."""
WHOLE = 1 << 20
"""Bytes. Files up to this size are read completely each time (`Identity.spots`)."""
SPOTS = 32
"""Pages of a larger file that are read each time."""
HEADER_LOOKED_AT = 256 << 10
CODES = {code: dtype for dtype, code in DTYPES.items()}


@dataclass(frozen=True)
class Identity:
    """The identity of a file: size, device, inode, times and samples of its contents; or size and a digest.

    None of these alone suffices: copying restores the modification time (`rsync -t`, `cp -p`); volumes that are built
    the same way have the same inodes, and also the same change times if the build is reproducible or the file system
    has none (squashfs, FUSE).
    """

    size: int
    device: int | None
    inode: int | None
    mtime_ns: int | None
    ctime_ns: int | None
    spots: str | None
    """SHA-256 of the header and of pages spread over the data, or of all of a small file."""
    sha256: str | None
    """With `digest=True`: the SHA-256 of the file; all other fields but the size are None then."""


class Source(NamedTuple):
    """An open file of tensors."""

    fd: int
    path: Path
    status: os.stat_result
    """Its status before anything was read."""
    identity: Identity


class Spec(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: str
    """The format's name of the dtype."""
    shape: tuple[int, ...]
    at: int
    """Offset of its bytes in the file."""
    nbytes: int


class Tensors(dict[str, "np.ndarray[Any, Any]"]):
    """Tensors by name, in the order of the file: read-only numpy arrays, which keep the image's memory.

    Copies, unions (`|`) and pickles keep `dtypes`, `shapes` and `metadata`. An array that is put in gets the format's
    dtype for its own.
    """

    dtypes: dict[str, str]
    """The format's name of each tensor's dtype; the arrays of `RAW` and `BITS` dtypes have only the same size."""
    shapes: dict[str, tuple[int, ...]]
    """The format's shapes, in elements."""
    metadata: dict[str, str]
    """The metadata of the file."""
    inherited: bool
    """Whether the image existed already; the file is then read, if at all, only to detect a change."""

    def __new__(cls, *_: object, **__: object) -> Self:
        """Make an empty mapping."""
        made = super().__new__(cls)
        made.dtypes, made.shapes, made.metadata, made.inherited = {}, {}, {}, False
        return made

    def __init__(self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **named: Any) -> None:
        """Take the arguments of `dict`."""
        super().__init__()
        self.update(tensors, **named)

    def _add(self, name: str, array: Any, dtype: str | None, shape: tuple[int, ...] | None) -> None:
        super().__setitem__(name, array)
        if dtype is None:
            self.dtypes.pop(name, None)
        else:
            self.dtypes[name] = dtype
        if shape is None:
            self.shapes.pop(name, None)
        else:
            self.shapes[name] = shape

    def __setitem__(self, name: str, array: Any) -> None:
        """Put an array in, with the format's dtype for its own."""
        code = getattr(getattr(array, "dtype", None), "str", None)
        self._add(name, array, CODES.get(code) if isinstance(code, str) else None, getattr(array, "shape", None))

    def __delitem__(self, name: str) -> None:
        """Take a tensor out. Raises: KeyError."""
        super().__delitem__(name)
        self.dtypes.pop(name, None)
        self.shapes.pop(name, None)

    def update(self, tensors: Any = (), /, **named: Any) -> None:
        """Put tensors in, with the dtypes, shapes and metadata of a `Tensors`."""
        if isinstance(tensors, Tensors):
            for name, array in tensors.items():
                self._add(name, array, tensors.dtypes.get(name), tensors.shapes.get(name))
            self.metadata.update(tensors.metadata)
        else:
            for name, array in dict(tensors).items():
                self[name] = array
        for name, array in named.items():
            self[name] = array

    def pop(self, name: str, *default: Any) -> Any:
        """Take a tensor out, and return it. Raises: KeyError without a default."""
        found = super().pop(name, *default)
        self.dtypes.pop(name, None)
        self.shapes.pop(name, None)
        return found

    def popitem(self) -> tuple[str, Any]:
        """Take the last one out. Raises: KeyError if there is none."""
        name, array = super().popitem()
        self.dtypes.pop(name, None)
        self.shapes.pop(name, None)
        return name, array

    def clear(self) -> None:
        """Take all out."""
        super().clear()
        self.dtypes.clear()
        self.shapes.clear()

    def setdefault(self, name: str, array: Any = None) -> Any:
        """Return a tensor; put it in first if there is none of that name."""
        if name not in self:
            self[name] = array
        return self[name]

    def copy(self) -> Self:
        """Copy the mapping; the arrays are the same."""
        known = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(self).items()}
        return _restored(type(self), dict(self), known)

    __copy__ = copy

    def __or__(self, other: Any) -> Self:  # type: ignore[override]
        """Return the union; for a name that both have, with the tensor of the other."""
        if not isinstance(other, dict):
            return NotImplemented
        made = self.copy()
        made.update(other)
        return made

    def __ror__(self, other: Any) -> Self:  # type: ignore[override]
        """Return the union of a dict and these; for a name that both have, with the tensor of these."""
        if not isinstance(other, dict):
            return NotImplemented
        made = self.copy()
        made.clear()
        made.update(other)
        made.update(self)
        return made

    def __ior__(self, other: Any) -> Self:  # type: ignore[override]
        """Put tensors in, as `update` does."""
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle, and copy deeply, with dtypes, shapes and metadata."""
        return _restored, (type(self), dict(self), dict(vars(self)))


T = TypeVar("T", bound=Tensors)


def _restored(kind: type[T], tensors: dict[str, Any], known: dict[str, Any]) -> T:
    made = kind.__new__(kind)
    dict.update(made, tensors)
    vars(made).update(known)
    return made


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    backing: str | os.PathLike[str] | None = None,
    digest: bool = False,
    verify: bool = False,
    timeout: float | None = WAIT,
    trust: Trust = "private",
) -> Tensors:
    """Return a file's tensors: attached, if an earlier call left an image; else, or if the file has changed, read.

    Args:
        name: of the image; by default made of the file's device and inode, or with `digest` of its contents.
        backing: the image's path on tmpfs or pmem; by default a file in this user's directory in /dev/shm
            (`place_of`), where it stays until `release`.
        digest: identify the file by its contents (SHA-256), which are read each time, rather than by its size, device,
            inode, times and samples of its contents.
        verify: compare every tensor of the image with its checksum; the file is not read for that.
        timeout: seconds to wait while another process fills the image; None has no limit.
        trust: the files that are used as an image, as for `kho.live.open`.

    Raises: SourceError; UntrustedError for an image that other users may change; FormatError for a malformed
        safetensors file, or an image that was tampered with; OutOfMemoryError; BusyError; StaleError if the file
        changes while it is read; ImportError without `safetensors`.

    """
    deadline = Deadline(timeout)
    with _opened(path_of(path), digest) as source:
        own = _name_of(source.path, source) if name is None else name
        where = place_of(own) if backing is None else path_of(backing)
        while True:
            there = own
            try:
                with attach(where, trust=trust) as candidate:
                    if (found := _tensors(candidate, source.identity)) is not None:
                        if verify:
                            candidate.verify()
                        return found
                    if name is None and candidate.version == VERSION:
                        there = candidate.name  # the image of another file, or of another name of this one
            except StaleError:
                if not deadline.sleep(POLL):
                    raise
                continue
            except SourceError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            try:
                filled = _fill_file(where, there, source, deadline, trust)
            except SourceError:
                if backing is not None or where.parent.exists() or not deadline.sleep(POLL):
                    raise
                place_of(own)  # a `release` has removed the directory, which it found empty
                continue
            if filled is not None:
                if name is None and backing is None:
                    _remove_replaced(where, source)
                return filled
            if not deadline.sleep(POLL / 10):
                raise BusyError(f"{where}: other processes replace the image all the time")


def load_into(h: Handle, path: str | os.PathLike[str], *, prefix: str = "", digest: bool = False) -> Tensors:
    """Return a file's tensors from an image that this process owns; reads and commits them first if they are missing.

    If the file has changed, its tensors replace the old ones; there must be room for both.

    Args: prefix: of the objects' names, so that one image can hold several files.
    Raises: as `load`; NotOwnerError. Nothing has changed then.
    """
    with _opened(path_of(path), digest) as source:
        if (found := _tensors(h, source.identity, prefix)) is not None:
            return found
        specs, metadata = _header(source.fd, source.path)
        if h.uncommitted:
            raise ParameterError(f"{source.path}: commit or roll back {', '.join(h.uncommitted[:3])} first")
        try:
            if not (same := _unchanged(h, prefix, source, specs, metadata)):
                _fill(h, prefix, source, specs)
            _commit(h, prefix, source, specs, metadata)
        except BaseException:
            h.rollback()
            raise
        return _made(h, source.identity, prefix, inherited=same)


def release(
    path: str | os.PathLike[str], *, name: str | None = None, backing: str | os.PathLike[str] | None = None
) -> bool:
    """Remove the image of a file, by any of its names, even of a file that is gone; returns whether there was one.

    Its memory is freed when the last process that has attached it ends.
    """
    if backing is not None:
        return _removed(path_of(backing))
    if name is not None:
        places = {place_of(name)}
    else:
        full = _full(path_of(path))
        places = {file for file, index in _images() if index.get("path") == full and file.name in _own_names(index)}
        with contextlib.suppress(OSError):
            places.add(place_of(_name_of(Path(path))))
    there = [_removed(place) for place in sorted(places)]
    with contextlib.suppress(OSError):  # others' images are in it
        _place().rmdir()
    return any(there)


def _removed(where: Path) -> bool:
    try:
        where.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise error_of(error, where, "remove") from error
    return True


def _place() -> Path:
    return Path(PLACE.format(uid=os.geteuid()))


def place_of(name: str) -> Path:
    """Return the default path of an image: in /dev/shm/kho-live-UID, a directory of mode 0700, made if it is missing.

    Raises: ParameterError for a name that is not a file name; UntrustedError if the directory is another user's.
    """
    if "/" in name or name in (".", "..") or not 1 <= len(name.encode()) <= MOST_NAME - 5:
        raise ParameterError(f"name {name!r}: a file's name of at most {MOST_NAME - 5} bytes is needed, or backing=")
    place = _place()
    try:
        # Every user may write /dev/shm, and a user who may write the directory may replace files in it.
        os.close(private_directory(place, make=True, hint="give backing=, a path on tmpfs"))
    except UntrustedError as error:
        raise UntrustedError(f"{error} (not a directory that is this user's alone)") from error
    except FileNotFoundError as error:
        raise SourceError(f"{place}: it was removed while it was being opened") from error
    return place / f"{name}.live"


def _own_names(index: Mapping[str, Any]) -> list[str]:
    """Return the file names that `load` gives an image by default."""
    return [
        f"{index.get('device')}-{index.get('inode')}.live",
        f"sha256-{str(index.get('sha256'))[:32]}.live",
    ]


def _name_of(path: Path, source: Source | None = None) -> str:
    """Name an image: by the file's device and inode, which all its names share, or by its digest. Raises: OSError."""
    if source is not None and source.identity.sha256 is not None:
        return f"sha256-{source.identity.sha256[:32]}"
    status = path.stat() if source is None else source.status
    return f"{status.st_dev}-{status.st_ino}"


def _full(path: Path) -> str:
    return os.path.realpath(path)


def _images() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the images in the default directory, with the description of each one's file."""
    for file in sorted(_place().glob("*.live")):
        with contextlib.suppress(KhoError), attach(file) as candidate:
            if candidate.version == VERSION and (index := _index(candidate, "")) is not None:
                yield file, index


def _remove_replaced(where: Path, source: Source) -> None:
    """Remove the images of files that had this file's path before."""
    full, identity = _full(source.path), source.identity
    try:
        if not same_file(os.stat(full), source.status):  # noqa: PTH116
            return  # this file has been replaced as well
    except OSError:
        return
    for file, index in _images():
        if file == where or index.get("path") != full or file.name not in _own_names(index):
            continue
        if identity.sha256 is not None or index.get("sha256") is None:
            with contextlib.suppress(KhoError):
                _removed(file)


# The file


@contextlib.contextmanager
def _opened(path: Path, digest: bool) -> Iterator[Source]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise error_of(error, path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{path}: not a file")
        try:
            identity = _identity(fd, status, digest)
        except OSError as error:
            raise error_of(error, path, "read") from error
        yield Source(fd, path, status, identity)
    finally:
        os.close(fd)


def _identity(fd: int, status: os.stat_result, digest: bool) -> Identity:
    size = status.st_size
    if not digest:
        spots = _spots(fd, size)
        return Identity(size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, spots, None)
    with open(os.dup(fd), "rb") as file:  # noqa: PTH123 - a descriptor
        file.seek(0)
        return Identity(size, None, None, None, None, None, hashlib.file_digest(file, "sha256").hexdigest())


def _spots(fd: int, size: int) -> str:
    """Return the SHA-256 of samples of a file: the header, and pages spread over the data including the last one."""
    if size <= WHOLE:
        return hashlib.sha256(os.pread(fd, size, 0)).hexdigest()
    header = min(8 + int.from_bytes(os.pread(fd, 8, 0), "little"), HEADER_LOOKED_AT)
    summed = hashlib.sha256(os.pread(fd, header, 0))
    for spot in range(SPOTS):
        summed.update(os.pread(fd, PAGE, (size - PAGE) * spot // (SPOTS - 1)))
    return summed.hexdigest()


def _header(fd: int, source: Path) -> tuple[list[Spec], dict[str, str]]:
    """Read and check the header with the library; returns the tensors and the metadata.

    The library returns no offsets, but has checked that tensors follow each other without holes up to the file's end.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("safetensors files need the safetensors package: pip install 'kho[live]'") from error
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if size < 8 or length > min(MOST_HEADER, size - 8):
        raise FormatError(f"{source}: a header of {length:#x} bytes, in a file of {size:#x}")
    try:
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy") as file:
            names: list[str] = file.offset_keys()
            if len(names) > MOST_TENSORS:
                raise FormatError(f"{source}: {len(names)} tensors, at most {MOST_TENSORS} are read")
            metadata = {str(key): str(value) for key, value in (file.metadata() or {}).items()}
            specs, at = [], 8 + length
            for name in names:
                part = file.get_slice(name)
                spec = _spec(source, name, part.get_dtype(), tuple(part.get_shape()), at)
                specs.append(spec)
                at += spec.nbytes
    except (SafetensorError, OSError, OverflowError) as error:
        if isinstance(error, KhoError):
            raise
        raise FormatError(f"{source}: {error}") from error
    if at != size:
        raise FormatError(f"{source}: tensors end at {at:#x}, the file at {size:#x}")
    return specs, metadata


def _spec(source: Path, name: str, dtype: str, shape: tuple[int, ...], at: int) -> Spec:
    if name == INDEX or "\0" in name or not 1 <= len(name.encode()) <= MOST_NAME or len(shape) > MOST_DIMENSIONS:
        raise FormatError(f"{source}: tensor {name!r} of {len(shape)} dimensions: images have no such object")
    count = math.prod(shape)
    if dtype in DTYPES or dtype in RAW:
        code = DTYPES.get(dtype) or RAW[dtype]
        return Spec(name, dtype, shape, at, count * int(code[2:]))
    if dtype in BITS and count * BITS[dtype] % 8 == 0:
        return Spec(name, dtype, shape, at, count * BITS[dtype] // 8)
    raise FormatError(f"{source}: tensor {name!r} of dtype {dtype} and shape {shape} is not known to kho")


# The image


def _fill_file(where: Path, name: str, source: Source, deadline: Deadline, trust: Trust) -> Tensors | None:
    """Make the image of a file, or wait for a process that makes it; None if the caller must attach again."""
    specs, metadata = _header(source.fd, source.path)
    # Unused pages take no memory, so the size includes what alignment may waste.
    room = ROOM + sum(-(-spec.nbytes // PAGE) * PAGE + min(spec.nbytes, ALIGN * PAGE) + PAGE for spec in specs)
    timeout = None if deadline.timeout is None else deadline.left()
    with open_at(where, name, room, version=VERSION, timeout=timeout, trust=trust) as h:
        if (found := _tensors(h, source.identity)) is not None:
            return found
        if not (same := _unchanged(h, "", source, specs, metadata)):
            if h.generation or h.stats()["size"] < room:
                # The file has changed: remove the image, which only its owner does; attached processes keep it.
                _removed(where)
                return None
            _fill(h, "", source, specs)
        _commit(h, "", source, specs, metadata)
        return _made(h, source.identity, "", inherited=same)


def _described(specs: list[Spec]) -> dict[str, list[Any]]:
    return {spec.name: [spec.dtype, list(spec.shape)] for spec in specs}


def _unchanged(h: Handle, prefix: str, source: Source, specs: list[Spec], metadata: dict[str, str]) -> bool:
    """Return whether a file whose times or path have changed still has the tensors that the image has."""
    index = _index(h, prefix)
    if index is None or type(index.get("size")) is not int or index["size"] != source.identity.size:
        return False
    if index["tensors"] != _described(specs) or index["metadata"] != metadata:
        return False
    room = memoryview(bytearray(min(CHUNK, max((spec.nbytes for spec in specs), default=0))))
    for spec in specs:
        if prefix + spec.name not in h or h.info(prefix + spec.name).nbytes != spec.nbytes:
            return False
        if not spec.nbytes:
            continue
        there = memoryview(h[prefix + spec.name].reshape(-1).view("u1"))
        for at in range(0, spec.nbytes, CHUNK):
            part = room[: min(CHUNK, spec.nbytes - at)]
            _read(source.fd, source.path, part, spec._replace(at=spec.at + at, nbytes=len(part)))
            if part != there[at : at + len(part)]:
                return False
    return True


def _fill(h: Handle, prefix: str, source: Source, specs: list[Spec]) -> None:
    needs = memory.unallocated(h.fileno(), sum(-(-spec.nbytes // PAGE) * PAGE for spec in specs))
    memory.check(needs, f"{source.path}: an image of its {len(specs)} tensors")
    if (before := _index(h, prefix)) is not None:
        for name in before["tensors"]:
            if prefix + name in h:
                del h[prefix + name]
    for spec in specs:
        code = DTYPES.get(spec.dtype) or RAW.get(spec.dtype)
        array = h.empty(prefix + spec.name, spec.shape if code else spec.nbytes, code or "|u1")
        if spec.nbytes:
            _read(source.fd, source.path, memoryview(array.reshape(-1).view("u1")), spec)


def _commit(h: Handle, prefix: str, source: Source, specs: list[Spec], metadata: dict[str, str]) -> None:
    """Commit the tensors with the description of their file. Raises: StaleError if it changed since it was opened."""
    then, now = source.status, os.fstat(source.fd)
    if any(getattr(then, key) != getattr(now, key) for key in ("st_size", "st_mtime_ns", "st_ctime_ns")):
        raise StaleError(f"{source.path}: it was changed while it was being read; load it again")
    index = {
        **asdict(source.identity),
        "path": _full(source.path),
        "metadata": metadata,
        "tensors": _described(specs),
    }
    h.put(prefix + INDEX, json.dumps(index).encode())
    h.commit()


def _read(fd: int, source: Path, place: memoryview, spec: Spec) -> None:
    done = 0
    while done < spec.nbytes:
        try:
            got = os.preadv(fd, [place[done : done + CHUNK]], spec.at + done)
        except OSError as error:
            raise error_of(error, source, "read") from error
        if not got:
            raise StaleError(f"{source}: it was cut short while it was being read")
        done += got


def _index(reader: Reader, prefix: str) -> dict[str, Any] | None:
    """Read an image's description of its file; None if there is none that this module wrote."""
    if prefix + INDEX not in reader:
        return None
    try:
        index = json.loads(bytes(reader[prefix + INDEX]))
        return index if isinstance(index["tensors"], dict) and isinstance(index["metadata"], dict) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _tensors(reader: Reader, identity: Identity, prefix: str = "") -> Tensors | None:
    """Return the tensors of an image, or None if they are not those of this file."""
    index = _index(reader, prefix)
    if index is None or any(index.get(key, "") != value for key, value in asdict(identity).items()):
        return None
    found = Tensors()
    found.inherited = True
    found.metadata = index["metadata"]
    try:
        for name, (dtype, shape) in index["tensors"].items():
            found._add(name, reader[prefix + name], dtype, tuple(shape))
    except (KhoError, ValueError, TypeError):
        return None
    return found


def _made(h: Handle, identity: Identity, prefix: str, *, inherited: bool) -> Tensors:
    made = _tensors(h, identity, prefix)
    if made is None:
        raise FormatError("what was just committed is not there: another process changed the image")
    made.inherited = inherited
    return made
