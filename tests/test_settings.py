"""Settings: read from the environment, refused with the variable's name, listed in the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import SettingsError
from backend.settings import Settings, licence_accepted, load_settings, settings_table

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_table_is_the_one_that_the_settings_say() -> None:
    text = README.read_text()
    start, end = text.index("<!-- settings table"), text.index("<!-- end of settings table")
    shown = text[text.index("\n", start) + 1 : end]
    assert shown == settings_table(), "write the output of `python -m backend.settings` into the README"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TILE_MPP", "0.25")
    monkeypatch.setenv("SLIDE_ROOTS", f"{tmp_path}, {tmp_path}/b")
    monkeypatch.setenv("DEFAULT_MPP", "")
    settings = load_settings()
    assert settings.tile_mpp == 0.25
    assert settings.slide_roots == (tmp_path.resolve(), tmp_path.resolve() / "b")
    assert settings.default_mpp is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TILE_PX", "no"),
        ("DEFAULT_MPP", "1000"),
        ("DEFAULT_MPP", "0"),
        ("DEVICES", "gpu"),
        ("LABEL_STUDIO_URL", "localhost:8080"),
        ("MODEL_SHA256", "abc"),
        ("PRECISION", "int8"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=variable):
        load_settings()


def test_secrets_are_not_shown() -> None:
    settings = Settings(
        label_studio_api_key="s3cret-token",
        basic_auth_user="u",
        basic_auth_pass="s3cret",
        redis_url="redis://:s3cret@host",
    )
    assert "s3cret" not in repr(settings)


def test_the_licence_is_accepted_only_by_the_users_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, accepted in (("i accept", True), ("I Accept", True), ("yes", False), ("", False)):
        monkeypatch.setenv("MMM_LICENSE_ACCEPTED", answer)
        assert licence_accepted() is accepted


def test_a_setting_that_is_refused_shows_no_other() -> None:
    for refused in (
        lambda: Settings(basic_auth_pass="s3cret", label_studio_api_key="t0ken"),
        lambda: load_settings(basic_auth_pass="s3cret"),
    ):
        with pytest.raises((ValueError, SettingsError)) as caught:
            refused()
        assert "s3cret" not in str(caught.value) and "t0ken" not in str(caught.value)
