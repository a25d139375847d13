"""Finding and loading a tokenizer.

A loaded tokenizer is not safe to share between threads that encode: encoding with other truncation or padding changes the
tokenizer for a moment, and a second thread is refused meanwhile. Use it from one thread, or give each thread a copy.deepcopy.
Looking tokens up, which is all that detokenising does, is safe anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config.checkpoint import ASSETS, TINY
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

_FILES = ("tokenizer.json", "vocab.json")


def load_tokenizer(source: VllmConfig | str | Path) -> Any:
    """The tokenizer of a folder or a Hugging Face id, as transformers loads it.

    Args:
        source: a configuration, for its `model_config.tokenizer`; or the folder or id itself. Presets other than the tiny one
            have no tokenizer and get the tiny one's.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is one that cannot be read.
    """
    if not isinstance(source, (str, Path)):
        source = source.model_config.tokenizer
    name, folder = str(source), Path(source).expanduser()
    if folder.is_dir():
        name = str(folder)
        if not any((folder / file).is_file() for file in _FILES):
            if ASSETS not in folder.resolve().parents:
                raise FileNotFoundError(f"--tokenizer {name}: the folder has no {' and no '.join(_FILES)}")
            name = str(TINY)
            logger.info(
                "The preset %s has no tokenizer: using the one of preset:tiny, with its small vocabulary", folder.name
            )
    elif folder.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"--tokenizer {name}: no such folder")

    tokenizer_class = _tokenizer_class(name)
    try:
        return tokenizer_class.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"--tokenizer {name}: neither a folder nor a model that the hub provides ({_line(error)})"
        ) from None
    except Exception as error:  # what a broken file raises depends on which part of which library trips over it
        raise ValueError(f"--tokenizer {name}: cannot be read ({_line(error)})") from None


def _tokenizer_class(name: str) -> Any:
    """Of transformers, imported here: half a second, which --help should not cost, and where the class is to be found out two."""
    if (Path(name) / "tokenizer.json").is_file():  # says all there is to say
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
