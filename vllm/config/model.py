"""What is served: the model's folder, its precision and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.config.hf_config import HFConfig
from vllm.config.knob import check_at_least, check_choices, knob
from vllm.config.quantization import METHODS


@dataclass(frozen=True)
class ModelConfig:
    """The model and how to read it.

    Inside a VllmConfig nothing here is "auto" or missing: `dtype`, `max_model_len`, `served_model_name`, `tokenizer`,
    `quantization` (None: plain weights), `model_path` and `hf_config` are what `VllmConfig.create` resolved them to, and
    `served_model_name` is the first of `served_model_names`.
    """

    model: str = knob("preset:tiny", "Folder of a checkpoint, a Hugging Face model id, or preset:NAME.")
    served_model_name: str | list[str] | None = knob(  # noqa: RUF009
        None,
        "Names that clients may use for the model; answers carry the first. Default: the value of --model.",
        many=True,
    )
    tokenizer: str | None = knob(None, "Folder or id of the tokenizer; default: the model's own.")
    revision: str | None = knob(None, "Branch, tag or commit of a model on the Hugging Face hub.")
    dtype: str = knob(
        "auto",
        "Precision of weights and activations; auto is the checkpoint's on a GPU and float32 on a CPU.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantization: str | None = knob(
        None,
        "Quantisation that the checkpoint must have; default: read from it.",
        choices=(None, *METHODS),
        short="-q",
    )
    max_model_len: int | None = knob(
        None, "Longest prompt plus output in tokens (32k is 32000, 32K is 32768); default: what the model was made for."
    )
    max_logprobs: int = knob(20, "Most log-probabilities a request may ask for at each position; -1 means all.")
    seed: int = knob(0, "Seed of everything random that no request's own seed decides.")
    hf_overrides: dict[str, Any] = knob({}, "JSON merged into the checkpoint's config.json.")  # noqa: RUF009
    generation_config: str = knob(
        "auto", "Where default sampling parameters come from: auto (the model), vllm (none), or a folder."
    )
    override_generation_config: dict[str, Any] = knob({}, "JSON merged into the default sampling parameters.")  # noqa: RUF009
    language_model_only: bool = knob(False, "Leave the vision tower out, even where the checkpoint has one.")

    served_model_names: list[str] = field(default_factory=list)
    model_path: str | None = None
    hf_config: HFConfig | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, max_model_len=1, max_logprobs=-1)
        if "" in self.given_names or self.served_model_name == []:
            raise ValueError("--served-model-name must not be empty")

    @property
    def given_names(self) -> list[str]:
        """What --served-model-name says, each name once."""
        names = self.served_model_name
        return [] if names is None else [names] if isinstance(names, str) else list(dict.fromkeys(names))


@dataclass(frozen=True)
class LoadConfig:
    """Where the weights come from."""

    load_format: str = knob(
        "auto",
        "auto and safetensors read the checkpoint; dummy fills random weights in, without reading any.",
        choices=("auto", "safetensors", "dummy"),
    )
    download_dir: str | None = knob(None, "Folder for models fetched from the hub; default: the hub's own cache.")
    use_tqdm_on_load: bool = knob(True, "Show a progress bar while weights are loaded.")

    def __post_init__(self) -> None:
        check_choices(self)
