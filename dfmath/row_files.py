"""Files of points that are read by rows: ``.npy``, a Zarr store, or a column of a Parquet file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath._checks import describe
from dfmath.datasets import load_arrays

KINDS = "a .npy or .npz file, a Zarr store or a .parquet file"


@dataclass(frozen=True)
class RowFile(ABC):
    """Points (N, d) in a file; rows are read without the rest. It may be sent to another process.

    Attributes
    ----------
    path
        Where the file is.
    shape
        (N, d).
    dtype
        float32 or float64.
    """

    path: Path
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def nbytes(self) -> int:
        """Bytes of all points."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Return rows start:stop."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise TypeError(f"points in a file are read by slices of rows, start:stop, got {describe(rows)}")
        start, stop, _ = rows.indices(len(self))
        return self.read(start, max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop, (stop - start, d)."""
        if start == stop:
            return np.empty((0, self.shape[1]), self.dtype)
        try:
            found = self._rows(start, stop)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"file {str(self.path)!r} could not be read at rows {start} to {stop}: {error}") from None
        if len(found) != stop - start:
            raise ValueError(
                f"file {str(self.path)!r} must hold {len(self)} rows as when it was opened, got no more than "
                f"{start + len(found)}: it shrank while it was read"
            )
        return found

    @abstractmethod
    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop, or as many as there are."""


@dataclass(frozen=True)
class NpyRows(RowFile):
    """Rows of a ``.npy`` file, read and not memory-mapped: a mapped page counts as memory, and a lost one kills."""

    offset: int

    def _rows(self, start: int, stop: int) -> np.ndarray:
        found = np.empty((stop - start, self.shape[1]), self.dtype)
        room, row = found.data.cast("B"), found.strides[0]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            read = 0
            while count := file.readinto(room[read:]):  # other threads go on meanwhile, which numpy.fromfile lets none
                read += count
        return found[: read // row]


@dataclass(frozen=True)
class ZarrRows(RowFile):
    """Rows of an array in a Zarr store."""

    def _rows(self, start: int, stop: int) -> np.ndarray:
        array = _zarr(self.path)
        return np.asarray(array[start : min(stop, array.shape[0])])


@dataclass(frozen=True)
class ParquetRows(RowFile):
    """Rows of a Parquet column of lists, each of d numbers."""

    column: str

    def _rows(self, start: int, stop: int) -> np.ndarray:
        file, first, pieces = _parquet(self.path), 0, []
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first < stop and first + count > start:
                table = file.read_row_group(group, columns=[self.column])
                rows = _list_rows(self.path, self.column, table.column(0), self.shape[1])
                pieces.append(rows[max(0, start - first) : stop - first])
            first += count
        return np.concatenate(pieces) if pieces else np.empty((0, self.shape[1]), self.dtype)


def dask_points(path: str | os.PathLike[str], column: str | None = None, chunk_bytes: int = 2**27) -> Any:
    """Return the points of a file as a Dask array (N, d) whose chunks are read by the workers that hold them.

    Parameters
    ----------
    path, column
        As of `open_rows`; every worker must find the file under this path.
    chunk_bytes
        Size of a chunk, about.

    Raises
    ------
    TypeError, ValueError
        If the file is not one that is read by rows, or Dask is not installed.
    """
    try:
        import dask.array as chunked
        from dask.delayed import delayed
    except ImportError:
        raise ValueError("dask_points needs Dask; pip install 'dask[array,distributed]'") from None
    rows = open_rows(path, column)
    rows = replace(rows, path=rows.path.resolve())
    width = rows.shape[1]
    step = max(1, _checks.positive_integer("chunk_bytes", chunk_bytes) // (width * rows.dtype.itemsize))
    read, pieces = delayed(rows.read, pure=False), []
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        pieces.append(chunked.from_delayed(read(start, stop), (stop - start, width), dtype=rows.dtype))
    return chunked.concatenate(pieces)


def open_rows(path: str | os.PathLike[str], column: str | None = None) -> RowFile:
    """Open points (N, d) for reading by rows.

    Parameters
    ----------
    path
        A ``.npy`` file in C order, a Zarr store (a folder) that holds one array, or a ``.parquet`` file.
    column
        The Parquet column, of lists of d numbers; needed where there are several columns.

    Raises
    ------
    TypeError, ValueError
        If it does not exist, is none of these, or holds other than float32 or float64 rows; or if the library that
        reads it is not installed.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise TypeError(f"path must name {KINDS}, got {describe(path)}")
    place = Path(path)
    if not place.exists():
        raise ValueError(f"path must name {KINDS}, got {str(path)!r}, which does not exist")
    if place.suffix == ".parquet":
        return _open_parquet(place, column)
    if column is not None:
        raise ValueError(f"column belongs to .parquet files, got {column!r} for {str(path)!r}")
    if place.is_dir() and not any((place / name).is_file() for name in (".zarray", ".zgroup", "zarr.json")):
        raise ValueError(f"path must name {KINDS}, got {str(path)!r}, which is a folder and no Zarr store")
    return _open_zarr(place) if place.is_dir() else _open_npy(place)


def _open_npy(path: Path) -> NpyRows:
    mapped = load_arrays(path, required=("points",))["points"]  # its header alone is looked at
    _check_rows(path, mapped.shape, mapped.dtype)
    if not isinstance(mapped, np.memmap) or not mapped.flags.c_contiguous:
        raise ValueError(
            f"file {str(path)!r} must be a .npy file in C order to be read by rows; "
            "numpy.save(FILE, numpy.ascontiguousarray(points)) writes one"
        )
    return NpyRows(path, mapped.shape, mapped.dtype, mapped.offset)


def _open_zarr(path: Path) -> ZarrRows:
    array = _zarr(path)
    _check_rows(path, tuple(array.shape), array.dtype)
    return ZarrRows(path, tuple(array.shape), np.dtype(array.dtype))


def _open_parquet(path: Path, column: str | None) -> ParquetRows:
    file = _parquet(path)
    names = file.schema_arrow.names
    if column is None and len(names) != 1:
        raise ValueError(f"column must name one of {', '.join(names)} in {str(path)!r}, got None")
    column = names[0] if column is None else column
    if column not in names:
        raise ValueError(f"column must name one of {', '.join(names)} in {str(path)!r}, got {column!r}")
    if file.metadata.num_rows == 0:
        raise ValueError(f"file {str(path)!r} must hold at least one row, got none")
    kind = file.schema_arrow.field(column).type
    if not hasattr(kind, "value_type") or str(kind.value_type) not in ("float", "double"):
        raise TypeError(f"column {column!r} in {str(path)!r} must hold lists of float or double, got {kind}")
    first = next(file.iter_batches(batch_size=1, columns=[column])).column(0)
    shape = (file.metadata.num_rows, len(first[0]))
    dtype = np.dtype("float32" if str(kind.value_type) == "float" else "float64")
    _check_rows(path, shape, dtype)
    return ParquetRows(path, shape, dtype, column)


def _check_rows(path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"points in {str(path)!r} must have dtype float32 or float64, got {dtype}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"points in {str(path)!r} must have shape (N, d), at least one point, got {tuple(shape)}")


def _list_rows(path: Path, column: str, chunked: Any, width: int) -> np.ndarray:
    """Return a column of lists as an array (rows, d)."""
    lists = chunked.combine_chunks()
    values = lists.flatten()
    if lists.null_count or values.null_count or len(values) != width * len(lists):
        raise ValueError(f"column {column!r} must hold lists of {width} numbers each, got others or nulls")
    return values.to_numpy(zero_copy_only=False).reshape(-1, width)


def _zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError:
        raise ValueError(f"path {str(path)!r} is a folder; to read it as a Zarr store, pip install zarr") from None
    try:
        array = zarr.open(str(path), mode="r")
    except Exception as error:  # each version and store has errors of its own
        raise ValueError(f"folder {str(path)!r} must be a Zarr store, got one that cannot be opened: {error}") from None
    if not hasattr(array, "chunks"):
        raise ValueError(f"Zarr store {str(path)!r} must hold one array, got a group; name the array's own folder")
    return array


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"path {str(path)!r} is a Parquet file; to read it, pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"file {str(path)!r} must be a Parquet file, got one that is damaged: {error}") from None
