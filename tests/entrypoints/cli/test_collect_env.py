import json

from vllm.entrypoints.cli import collect_env
from vllm.entrypoints.cli import main as cli
from vllm.entrypoints.cli.nvidia_smi import GPU


def test_text_and_json(capsys):
    assert cli.main(["collect-env"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["collect-env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for name in ("vllm", "CUDA kernels", "Python", "torch", "triton", "transformers", "driver"):
        assert name in text and facts[name]


def test_gpus_and_secrets(monkeypatch):
    monkeypatch.setattr(collect_env, "gpus", lambda: [GPU("0", "u", "NVIDIA X", 80 << 30, "9.0", "580.1")])
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    facts = collect_env.collect()
    assert facts["GPU 0"] == "NVIDIA X, 80.0 GiB, compute capability 9.0" and facts["driver"] == "580.1"
    assert facts["VLLM_API_KEY"] == "(set)" and facts["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "hidden" not in json.dumps(facts)


def test_missing_packages_say_so(monkeypatch):
    monkeypatch.setattr(collect_env, "PACKAGES", ("no-such-package",))
    assert collect_env.collect()["no-such-package"] == "not installed"
