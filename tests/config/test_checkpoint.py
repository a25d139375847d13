import json

import pytest

from vllm.config import load_hf_config, preset_names, resolve_model
from vllm.config.checkpoint import ASSETS, read_json


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_presets():
    assert resolve_model("preset:qwen3.5-9b") == ASSETS / "presets" / "qwen3.5-9b"
    assert "tiny" in preset_names() and len(preset_names()) == 15
    with pytest.raises(ValueError, match=r"no preset 'qwen'; there are: .*qwen3\.5-27b"):
        resolve_model("preset:qwen")


def test_tiny_is_the_bundled_checkpoint(tiny_model):
    assert resolve_model("preset:tiny") == tiny_model
    assert load_hf_config(tiny_model).text.num_experts == 8


@pytest.mark.parametrize("model", ["/no/such/folder", "./here", "~/there", "a/b/c", "word"])
def test_missing_folder(model):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_model(model)


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        resolve_model(str(tmp_path))


def test_hub_id_while_offline(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("someone/some-model", download_dir=str(tmp_path))
    assert "someone/some-model" in str(caught.value) and "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_downloads_only_what_is_needed(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def snapshot_download(model, **kwargs):
        calls.append((model, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("a/b", "main", "/cache") == tmp_path
    assert resolve_model("a/b", weights=False) == tmp_path
    assert calls[0][0] == "a/b" and calls[0][1]["revision"] == "main" and calls[0][1]["cache_dir"] == "/cache"
    assert "*.safetensors" in calls[0][1]["allow_patterns"]
    assert "*.safetensors" not in calls[1][1]["allow_patterns"]


@pytest.mark.parametrize(
    ("name", "kind"), [("RepositoryNotFoundError", ValueError), ("RevisionNotFoundError", ValueError)]
)
def test_hub_errors_are_one_line(monkeypatch, name, kind):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(model, **kwargs):
        response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/a/b"))
        raise getattr(errors, name)("many\nlines", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match="a/b") as caught:
        resolve_model("a/b", "rev")
    assert "\n" not in str(caught.value)


def test_broken_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_json(path)


def test_generation_config_adds_stop_tokens(tmp_path):
    raw = read_json(resolve_model("preset:qwen3.5-9b") / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_hf_config(tmp_path).eos_token_ids == (248044,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [248046, 248044]}))
    assert load_hf_config(tmp_path).eos_token_ids == (248046, 248044)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_hf_config(tmp_path).eos_token_ids == (5, 248044)
