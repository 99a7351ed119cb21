"""Documents: versions, damage, and receipts that are never taken for another's."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.store import FileStore
from nanochat.store.digests import digest_bytes
from nanochat.store.documents import DocumentError
from nanochat.store.receipts import (
    FileRef,
    Receipt,
    current_receipt,
    missing_outputs,
    point,
    read_receipt,
    write_receipt,
)

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def receipt(fingerprint: str = "ab" * 32, token: str = "t1", **changes: object) -> Receipt:
    fields = {
        "stage": "base",
        "stage_version": 1,
        "fingerprint": fingerprint,
        "token": token,
        "created_at": NOW,
        "seconds": 1.5,
        "outputs": (FileRef(key="stages/base/x/model", size_bytes=3, sha256="0" * 64),),
    }
    return Receipt.model_validate({**fields, **changes})


def test_a_receipt_survives_its_bytes() -> None:
    original = receipt(metrics={"val_bpb": 1.25}, samples=({"prompt": "a", "text": "b"},))
    assert Receipt.from_bytes(original.to_bytes(), "r") == original
    assert Receipt.from_bytes(original.to_bytes(), "r").digest() == original.digest()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not JSON"),
        (b"\x80\x04pickle", "not JSON"),
        (b"[1, 2]", "not a nanochat.receipt"),
        (b'{"schema": "nanochat.lease", "version": 1}', "not a nanochat.receipt"),
        (b'{"schema": "nanochat.receipt", "version": "1"}', "no usable schema version"),
        (b'{"schema": "nanochat.receipt", "version": 99}', "schema version 99"),
        (b'{"schema": "nanochat.receipt", "version": 1}', "not a valid nanochat.receipt"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_document_that_is_not_one_is_refused_by_name(data: bytes, complaint: str) -> None:
    with pytest.raises(DocumentError, match=r"some/key\.json.*") as error:
        Receipt.from_bytes(data, "some/key.json")
    assert complaint in str(error.value)


def test_unknown_fields_are_refused() -> None:
    body = json.loads(receipt().to_bytes()) | {"surprise": 1}
    with pytest.raises(DocumentError, match="r is damaged: its content is not that of the digest at its end"):
        Receipt.from_bytes(json.dumps(body).encode(), "r")
    del body["document_sha256"]
    with pytest.raises(DocumentError, match="surprise"):
        Receipt.from_bytes(json.dumps(body).encode(), "r")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "9" * 5000])
def test_numbers_that_are_none_are_refused_by_name(number: str) -> None:
    damaged = re.sub(rb'"seconds": [0-9.]+', f'"seconds": {number}'.encode(), receipt().to_bytes())
    with pytest.raises(DocumentError, match=r"^r is "):
        Receipt.from_bytes(damaged, "r")


@given(st.data())
def test_a_document_with_a_flipped_bit_is_refused_or_says_the_same(data: st.DataObject) -> None:
    stored = receipt(metrics={"val_bpb": 1.25}).to_bytes()
    place = data.draw(st.integers(0, len(stored) - 1))
    flipped = bytearray(stored)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = Receipt.from_bytes(bytes(flipped), "r")
    except DocumentError:
        return
    assert found == Receipt.from_bytes(stored, "r")  # white space, or a letter of an escape


def test_a_receipt_keeps_the_digest_of_its_stored_bytes_when_the_document_gains_a_field(tmp_path) -> None:
    store = FileStore(tmp_path)
    body = json.loads(receipt().to_bytes())
    del body["warnings"], body["document_sha256"]  # as a version wrote it that had neither yet
    stored = json.dumps(body).encode()
    store.put("stages/base/abababababab/receipt.json", stored)
    found = read_receipt(store, "base", "ab" * 32)
    assert found is not None
    assert found.digest() == digest_bytes(stored) != digest_bytes(found.to_bytes())
    made = receipt()
    assert made.digest() == digest_bytes(made.to_bytes())


def test_a_receipt_of_another_fingerprint_is_refused_with_both(tmp_path) -> None:
    store = FileStore(tmp_path)
    first, second = "ab" * 32, "abababababab" + "cd" * 26
    write_receipt(store, receipt(first))
    assert read_receipt(store, "base", first) == receipt(first)
    assert read_receipt(store, "base", "cd" * 32) is None
    with pytest.raises(
        DocumentError, match=rf"base/abababababab/receipt\.json.* of base {first}, .* base {second}"
    ):
        read_receipt(store, "base", second)


def test_the_newest_receipt_is_current_and_the_old_one_stays(tmp_path) -> None:
    store = FileStore(tmp_path)
    write_receipt(store, receipt(token="t1"))
    write_receipt(store, receipt(token="t2"))
    current = read_receipt(store, "base", "ab" * 32)
    assert current is not None
    assert current.token == "t2"
    assert len(list(store.list("stages/base/abababababab/receipts/"))) == 2


def test_two_models_share_a_stage_through_pointers(tmp_path) -> None:
    store = FileStore(tmp_path)
    write_receipt(store, receipt())
    for model in ("one", "two"):
        point(store, model, "base", "ab" * 32)
        found = current_receipt(store, model, "base")
        assert found is not None
        assert found.token == "t1"
    assert current_receipt(store, "three", "base") is None


def test_outputs_that_are_gone_or_short_are_named(tmp_path) -> None:
    store = FileStore(tmp_path)
    made = receipt()
    assert missing_outputs(store, made) == ["stages/base/x/model is gone"]
    store.put("stages/base/x/model", b"12")
    assert "has 2 bytes, the receipt says 3" in missing_outputs(store, made)[0]
    store.put("stages/base/x/model", b"123")
    assert missing_outputs(store, made) == []
