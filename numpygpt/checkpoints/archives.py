"""Zip archives whose members lie uncompressed in the file: what torch.save and np.savez write."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
from typing import NamedTuple

from ..errors import CheckpointError
from ..params import shown
from .arrays import DataFile

__all__ = ["Member", "StoredZip"]

# Python makes 700 bytes of an entry of 46 and a name, so 2 MiB become at most 31 MB. The directory
# of gpt2-xl with its optimiser, the largest known, has 200 KB.
LARGEST_DIRECTORY = 2**21

ENCRYPTED = 1  # a bit among a member's flags


class Member(NamedTuple):
    """Where a member's bytes lie in the file."""

    start: int
    size: int


class StoredZip:
    """A zip archive without compression; nothing in it is unpacked.

    Parameters
    ----------
    path : pathlib.Path

    Attributes
    ----------
    file : DataFile
    names : list of str
        Of all members.
    members : dict of str to Member
        Those that are not compressed; none overlaps another.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """

    def __init__(self, path: pathlib.Path):
        self.file = DataFile(path)
        self.names: list[str] = []
        self.members: dict[str, Member] = {}
        try:
            with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                end = archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as why:
            raise CheckpointError(
                f"{path}: truncated or damaged zip archive: {shown(why)}"
            ) from None
        if infos and infos[0].header_offset < 0:
            raise CheckpointError(f"{path}: a member of the archive lies before its beginning")
        # NumPy and torch leave no comment there, so the directory's end is that of the file.
        if self.file.map[-22:-18] != b"PK\5\6":
            raise CheckpointError(f"{path}: bytes behind the archive that belong to nothing")
        # A member ends before the next one, or before the directory.
        limits = [*(info.header_offset for info in infos), end][1:]
        seen: set[str] = set()
        for info, limit in zip(infos, limits, strict=True):
            if info.filename in seen:
                raise CheckpointError(f"{path}: {shown(info.filename)!r} stands in it twice")
            if info.filename.endswith("/"):  # a directory
                continue
            seen.add(info.filename)
            self.names.append(info.filename)
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ENCRYPTED:
                self.members[info.filename] = self._member(info, limit)

    def require_stored(self) -> None:
        """Refuse an archive with a member that is compressed.

        Raises
        ------
        CheckpointError
            Naming the first.
        """
        for name in self.names:
            if name not in self.members:
                raise CheckpointError(
                    f"{self.file.path}: {shown(name)!r} is compressed or encrypted; unpack the "
                    f"archive and pack it without compression, or save it again with torch.save "
                    f"or np.savez"
                )

    def read(self, name: str, most: int) -> bytes:
        """A small member.

        Raises
        ------
        CheckpointError
            If it is missing or has over `most` bytes.
        """
        member = self.members.get(name)
        if member is None:
            raise CheckpointError(f"{self.file.path}: has no member {shown(name)!r}")
        if member.size > most:
            raise CheckpointError(
                f"{self.file.path}: {shown(name)!r} has {member.size} bytes, expected at most "
                f"{most}"
            )
        return self.file.map[member.start : member.start + member.size]

    def _member(self, info: zipfile.ZipInfo, limit: int) -> Member:
        path, name = self.file.path, repr(shown(info.filename))
        # The local header has a name and extra fields of its own length.
        local = self.file.map[info.header_offset : info.header_offset + 30]
        if len(local) < 30 or local[:4] != b"PK\3\4":
            raise CheckpointError(f"{path}: {name} does not lie where the directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if info.compress_size != info.file_size or start + info.file_size > limit:
            raise CheckpointError(f"{path}: {name} overlaps what follows it")
        return Member(start, info.file_size)


class _Bounded(io.FileIO):
    """A file that refuses to be read in pieces larger than a zip directory should be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            here = self.tell()
            size = self.seek(0, 2) - here
            self.seek(here)
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size) or b""
