"""A checkpoint's tensors by canonical name: headers first, then data in the order of the files."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import TensorInfo

logger = init_logger(__name__)

SKIPPED = ("mtp.", "model.visual.", "visual.")
"""Prefixes of tensors that belong to parts this version does not run: draft layers, the vision tower."""

_PREFIXES = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_KV_SCALE = re.compile(r"\.self_attn\.(?:attn|([kv])_proj)\.(?:([kv])_scale|output_scale)$")
"""Where else the scales of fp8 keys and values are found; canonical is `self_attn.k_scale`."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}

CHUNK = 32 << 20
"""Bytes read at once; a larger tensor is a chunk of its own. One chunk is in use while the next is read."""


def canonical_name(name: str) -> str:
    """The language model's tensors without the prefixes that multimodal files add: `model.layers.0...`, `lm_head.weight`."""
    for prefix, short in _PREFIXES:
        if name.startswith(prefix):
            name = short + name[len(prefix) :]
            break
    if found := _KV_SCALE.search(name):
        which = found[1] or found[2]
        return f"{name[: found.start()]}.self_attn.{which}_scale" if which else name
    return name


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. `key` is its name in the file."""

    file: Path
    key: str
    info: TensorInfo
    begin: int  # bytes of the file
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


class Checkpoint:
    """The safetensors files of a folder.

    Args:
        folder: with `model.safetensors.index.json` and the files that it names, or with *.safetensors files alone.

    Attributes:
        entries: canonical name -> entry, without the tensors of skipped parts, in the order in which they lie in the files.
        skipped: canonical names of those tensors.

    Raises:
        ValueError: there are no such files, one is missing, damaged or truncated, or two tensors have one canonical name.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self.skipped: list[str] = []
        for file in _files(self.folder):
            for entry in read_header(file):
                name = canonical_name(entry.key)
                if name.startswith(SKIPPED):
                    self.skipped.append(name)
                elif name in self.entries:
                    other = self.entries[name]
                    raise ValueError(f"{file}: {entry.key} is already in {other.file.name} as {other.key}")
                else:
                    self.entries[name] = entry
        if self.skipped:
            count = len(self.skipped)
            logger.debug("%s: skipped %d tensors of draft layers and the vision tower", self.folder, count)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: entry.info for name, entry in self.entries.items()}

    @property
    def modules(self) -> set[str]:
        """Canonical names of all modules, also those of skipped parts."""
        return {name.rpartition(".")[0] for name in (*self.entries, *self.skipped)}

    def read(self, names: set[str], pin: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors on the CPU, in the order of the files. A tensor holds until the next one is asked for.

        Args:
            pin: read into memory that a GPU copies from directly.
        """
        # The same two buffers throughout: fresh memory costs more than reading, where the system has to clear it page by page.
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        with ThreadPoolExecutor(1) as reader:
            ahead: Future | None = None
            for i, chunk in enumerate(self._chunks(names)):
                now, ahead = ahead, reader.submit(_read_chunk, chunk, buffers[i % 2])
                if now is not None:
                    yield from now.result()
            if ahead is not None:
                yield from ahead.result()

    def _chunks(self, names: set[str]) -> Iterator[list[tuple[str, Entry]]]:
        """Runs of neighbours in a file, up to CHUNK bytes together."""
        chunk: list[tuple[str, Entry]] = []
        for name, entry in self.entries.items():
            if name not in names:
                continue
            if chunk:
                first, last = chunk[0][1], chunk[-1][1]
                if entry.file != last.file or entry.begin != last.end or entry.end - first.begin > CHUNK:
                    yield chunk
                    chunk = []
            chunk.append((name, entry))
        if chunk:
            yield chunk


def _read_chunk(chunk: list[tuple[str, Entry]], buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    file, begin, end = chunk[0][1].file, chunk[0][1].begin, chunk[-1][1].end
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            for start in range(begin, end, len(buffer)):
                _read_into(stream, memoryview(buffer.numpy())[: end - start])
            # A larger tensor has only passed through: it is in the system's cache now, and can be used from there.
            data = buffer if end - begin <= len(buffer) else _mapped(stream, begin, end)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    return [(name, _tensor(data[entry.begin - begin : entry.end - begin], entry)) for name, entry in chunk]


def _read_into(stream: RawIOBase, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise OSError(f"it ends at byte {stream.tell()}")
        done += count


def _mapped(stream: RawIOBase, begin: int, end: int) -> torch.Tensor:
    """Bytes of a file as memory, writable in name only."""
    first = begin - begin % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(stream.fileno(), end - first, offset=first, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=begin - first)


def _tensor(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Bytes as the tensor that they are."""
    dtype = DTYPES.get(entry.info.dtype)
    if dtype is None:
        raise ValueError(f"{entry.file}: {entry.key} is of type {entry.info.dtype}, which cannot be read")
    if data.storage_offset() % dtype.itemsize or data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(entry.info.shape)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{index}: not an index of safetensors files") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: {_some(missing)} missing, of the {len(names)} files that {index.name} names")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: there are no safetensors files")
    return files


def read_header(file: Path) -> list[Entry]:
    """Tensors of a safetensors file, in their order: 8 bytes of header length, a JSON header, the data.

    Raises:
        ValueError: the file is damaged, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [
                Entry(
                    file,
                    key,
                    TensorInfo(t["dtype"], tuple(t["shape"]), file.name),
                    *(8 + length + offset for offset in t["data_offsets"]),
                )
                for key, t in header.items()
            ]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{file}: damaged, its header cannot be read") from None
    entries.sort(key=lambda entry: entry.begin)
    end = max((entry.end for entry in entries), default=8 + length)
    if end != size:
        raise ValueError(f"{file}: damaged, {size} bytes where its header says {end}")
    if broken := next((e for e in entries if not _has_its_size(e)), None):
        raise ValueError(
            f"{file}: damaged, {broken.key} has {broken.num_bytes} bytes for {broken.info.dtype} {list(broken.info.shape)}"
        )
    return entries


def _has_its_size(entry: Entry) -> bool:
    dtype = DTYPES.get(entry.info.dtype)
    return dtype is None or entry.num_bytes == prod(entry.info.shape) * dtype.itemsize


def _some(names: list[str], limit: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
