"""The address of a panel opens one slide, and nobody can make one up."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from backend.errors import SignatureInvalid, SourceError
from backend.slides.source import SlideRef
from backend.web.signing import SlideSigner

REF = SlideRef("file", ("/slides/a & b/Prostata ü.svs",), "/slides/a & b/Prostata ü.svs|12|34", 0.25)


def test_a_token_says_what_was_signed_and_fits_into_an_address_as_it_is(tmp_path: Path) -> None:
    signer = SlideSigner(tmp_path)
    token = signer.token(REF, project=7)
    assert signer.read(token).ref == REF
    assert signer.read(token).project == 7
    assert signer.read(signer.token(REF)).project is None
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


def test_every_change_of_a_single_character_is_noticed(tmp_path: Path) -> None:
    signer = SlideSigner(tmp_path)
    token = signer.token(REF)
    payload, signature = token.split(".")
    for place in range(len(payload)):
        other = "A" if payload[place] != "A" else "B"
        with pytest.raises(SignatureInvalid):
            signer.read(f"{payload[:place]}{other}{payload[place + 1 :]}.{signature}")
    for place in range(len(signature) - 1):  # two bits of the last one say nothing
        other = "A" if signature[place] != "A" else "B"
        with pytest.raises(SignatureInvalid):
            signer.read(f"{payload}.{signature[:place]}{other}{signature[place + 1 :]}")


@pytest.mark.parametrize("token", ["", ".", "abc", "abc.def", "ü.ü", "a" * 100_000, "eJyrVgIAAQ0Ag.", "%00.%00"])
def test_what_is_no_token_is_refused_as_a_wrong_signature(token: str, tmp_path: Path) -> None:
    with pytest.raises(SignatureInvalid, match="not made by this backend"):
        SlideSigner(tmp_path).read(token)


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    token = SlideSigner(tmp_path).token(REF)
    assert SlideSigner(tmp_path).read(token).ref == REF, "another process has the same key"
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    with pytest.raises(SignatureInvalid):
        SlideSigner(tmp_path / "elsewhere").read(token)


def test_a_bag_of_patches_has_no_panel(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no slide to look at"):
        SlideSigner(tmp_path).token(SlideRef("patches", ("/a.png", "/b.png"), "x"))
