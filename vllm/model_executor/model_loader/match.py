"""Which tensor fills which part of which parameter, settled from headers before any data is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from torch import nn

from vllm.model_executor.layers.quantization.unquantized import PLAIN_DTYPES
from vllm.model_executor.model_loader.checkpoint import Checkpoint, Entry, _some
from vllm.model_executor.parameter import Slot

INTEGER_DTYPES = ("I32",)


def checkpoint_slots(model: nn.Module) -> Iterator[Slot]:
    """Slots of all modules, in the order of the module tree."""
    for module in model.modules():
        if hasattr(module, "checkpoint_slots"):
            yield from module.checkpoint_slots()


def match_slots(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Slot]:
    """Canonical tensor name -> its slot, for every tensor of the checkpoint.

    Raises:
        ValueError: tensors are unexpected or missing, have the wrong shape or type, or fill the same place twice. One line names the
            first few of each kind.
    """
    slots = list(checkpoint_slots(model))
    by_name = {slot.name: slot for slot in slots}
    assert len(by_name) == len(slots), "two slots of the model have one name"
    entries = checkpoint.entries
    problems = {
        "unexpected": [f"{name} (in {entry.file.name})" for name, entry in entries.items() if name not in by_name],
        "missing": [],
        "unfit": [_misfit(slot, entries[slot.name]) for slot in slots if slot.name in entries],
        "repeated": [],
    }
    problems["unfit"] = [text for text in problems["unfit"] if text]
    if not problems["unfit"]:
        fillable = {id(slot.param) for slot in slots}
        assert all(id(param) in fillable for param in model.parameters()), "a parameter of the model has no slot"
        problems["missing"], problems["repeated"] = _coverage(slots, checkpoint)
    if any(problems.values()):
        raise ValueError(
            f"{checkpoint.folder}: " + "; ".join(_count(kind, names) for kind, names in problems.items() if names)
        )
    return {name: by_name[name] for name in entries}


def _misfit(slot: Slot, entry: Entry) -> str | None:
    """What is wrong with the tensor that is to go into a slot."""
    if entry.info.shape != slot.shape:
        return f"{slot.name} is {list(entry.info.shape)} instead of {list(slot.shape)} (in {entry.file.name})"
    if slot.param is None:
        return None
    wanted = slot.dtypes or (PLAIN_DTYPES if slot.param.is_floating_point() else INTEGER_DTYPES)
    if entry.info.dtype not in wanted:
        return f"{slot.name} is of type {entry.info.dtype} instead of {' or '.join(wanted)} (in {entry.file.name})"
    return None


def _coverage(slots: list[Slot], checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Names of tensors that are missing, and of those that fill what another has filled."""
    by_param: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        if slot.param is not None:
            by_param[id(slot.param)].append(slot)
    used = {slot.layout for slot in slots if slot.name in checkpoint.entries} - {""}
    missing, repeated = [], []
    for mine in by_param.values():
        present = [slot for slot in mine if slot.name in checkpoint.entries]
        shape = mine[0].param.shape
        filled = np.zeros(shape[:-1] if len(shape) > 1 else shape, dtype=bool)  # regions are whole rows
        for slot in present:
            if filled[slot.region].any():
                repeated.append(slot.name)
            filled[slot.region] = True
        if not filled.all():
            # Of alternatives, ask for the one that was begun, or that other layers use.
            layout = next((s.layout for s in [*present, *mine] if s.layout in used), mine[0].layout)
            missing += [s.name for s in mine if s.layout == layout and s.name not in checkpoint.entries]
    return missing, repeated


def _count(kind: str, names: list[str]) -> str:
    what = {
        "unexpected": "unexpected",
        "missing": "missing",
        "unfit": "of the wrong shape or type",
        "repeated": "for a place that another has filled",
    }[kind]
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {_some(names)}"
