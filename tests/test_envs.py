"""The environment table, the logger's level, and the one warning about what is not read."""

import logging

import pytest

from vllm import envs, logger


def test_defaults_parse(monkeypatch):
    for name, variable in envs.VARIABLES.items():
        monkeypatch.delenv(name, raising=False)
        assert getattr(envs, name) == variable.parse(variable.default)
        assert variable.help.endswith(".")


def test_read_when_used(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "debug")
    assert envs.VLLM_LOGGING_LEVEL == "DEBUG"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert envs.VLLM_LOGGING_LEVEL == "ERROR"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("", False), ("Off", False)])
def test_flags(text, value):
    assert envs._flag(text) is value


def test_a_bad_value_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "LOUD")
    with pytest.raises(ValueError, match="VLLM_LOGGING_LEVEL='LOUD': expected one of DEBUG, INFO"):
        _ = envs.VLLM_LOGGING_LEVEL
    with pytest.raises(ValueError, match="expected 0 or 1"):
        envs._flag("maybe")


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="VLLM_NOTHING"):
        _ = envs.VLLM_NOTHING


def test_unknown_variables_get_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(envs, "_warned", False)
    monkeypatch.setenv("VLLM_ZZZ", "1")
    monkeypatch.setenv("VLLM_AAA", "1")
    with caplog.at_level(logging.WARNING, logger="vllm"):
        envs.warn_unknown()
        envs.warn_unknown()
    (message,) = [m for m in caplog.messages if "VLLM_AAA" in m]
    assert {"VLLM_AAA", "VLLM_ZZZ"} <= set(message.replace(",", "").split())
    assert "VLLM_LOGGING_LEVEL" not in message


def test_known_variables_get_none(monkeypatch, caplog):
    monkeypatch.setattr(envs, "_warned", False)
    for name in envs.unknown():
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    envs.warn_unknown()
    assert caplog.messages == []


def test_once_means_once_for_the_same_words(caplog, monkeypatch):
    monkeypatch.setattr(logger, "_said", set())
    log = logger.init_logger("vllm.tests")
    with caplog.at_level(logging.INFO, logger="vllm"):
        for _ in range(3):
            log.warning_once("slow: %s", "a")
            log.info_once("slow: %s", "b")
    assert caplog.messages == ["slow: a", "slow: b"]
    assert {record.filename for record in caplog.records} == {"test_envs.py"}


def test_once_below_the_level_is_not_spent(caplog, monkeypatch):
    monkeypatch.setattr(logger, "_said", set())
    log = logger.init_logger("vllm.tests")
    with caplog.at_level(logging.ERROR, logger="vllm"):
        log.info_once("later")
    with caplog.at_level(logging.INFO, logger="vllm"):
        log.info_once("later")
    assert caplog.messages == ["later"]


def test_one_handler():
    for _ in range(3):
        logger.init_logger("vllm.tests")
    assert sum(getattr(handler, "_vllm", False) for handler in logging.getLogger("vllm").handlers) == 1
