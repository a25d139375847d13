"""A checkpoint's tensors by canonical name: headers first, data one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

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
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16, "I16": 16}  # others: 8, for progress only


def canonical_name(name: str) -> str:
    """The language model's tensors without the prefixes that multimodal files add: `model.layers.0...`, `lm_head.weight`."""
    for prefix, short in _PREFIXES:
        if name.startswith(prefix):
            return short + name[len(prefix) :]
    return name


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. `key` is its name in the file."""

    file: Path
    key: str
    info: TensorInfo

    @property
    def num_bytes(self) -> int:
        return prod(self.info.shape) * _BITS.get(self.info.dtype, 8) // 8


class Checkpoint:
    """The safetensors files of a folder.

    Args:
        folder: with `model.safetensors.index.json` and the files that it names, or with *.safetensors files alone.

    Attributes:
        entries: canonical name -> entry, without the tensors of skipped parts.

    Raises:
        ValueError: there are no such files, one is missing, damaged or truncated, or two tensors have one canonical name.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        skipped = 0
        for file in _files(self.folder):
            for key, info in read_header(file).items():
                name = canonical_name(key)
                if name.startswith(SKIPPED):
                    skipped += 1
                elif name in self.entries:
                    other = self.entries[name]
                    raise ValueError(f"{file}: {key} is already in {other.file.name} as {other.key}")
                else:
                    self.entries[name] = Entry(file, key, info)
        if skipped:
            logger.debug("%s: skipped %d tensors of draft layers and the vision tower", self.folder, skipped)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: entry.info for name, entry in self.entries.items()}

    def read(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors on the CPU, file by file; each is freed when the caller lets go of it."""
        files: dict[Path, list[str]] = {}
        for name, entry in self.entries.items():
            if name in names:
                files.setdefault(entry.file, []).append(name)
        for file, wanted in files.items():
            try:
                with safe_open(file, framework="pt", device="cpu") as tensors:
                    for name in wanted:
                        yield name, tensors.get_tensor(self.entries[name].key)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: cannot be read: {error}") from None


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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file: 8 bytes of header length, a JSON header, the data.

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
            end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
            tensors = {name: TensorInfo(t["dtype"], tuple(t["shape"])) for name, t in header.items()}
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            raise ValueError(f"{file}: damaged, its header cannot be read") from None
    if end != size:
        raise ValueError(f"{file}: damaged, {size} bytes where its header says {end}")
    return tensors


def _some(names: list[str], limit: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
