from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from firesteel.sdk.errors import ConfigError
from firesteel.service import keys
from firesteel.service.records import Records, now


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = Records.open(f"sqlite:///{tmp_path}/records.sqlite")
    yield opened
    opened.close()


def test_a_new_key_has_256_random_bits_and_fits_into_a_header() -> None:
    texts = {keys.new_key() for _ in range(200)}
    assert len(texts) == 200
    bits = [base64.urlsafe_b64decode(text.removeprefix("fs-") + "=") for text in texts]
    assert {len(each) for each in bits} == {32}
    assert all(re.fullmatch(r"fs-[A-Za-z0-9_-]{43}", text) for text in texts)
    # Each of the 256 bits is set in some keys and not in others.
    assert all(0 < sum(each[i // 8] >> i % 8 & 1 for each in bits) < 200 for i in range(256))


def test_a_key_opens_with_and_without_the_prefix_that_some_clients_need(records: Records) -> None:
    key, text = keys.create(records, "laptop", "account-1")
    assert (key.name, key.account, key.revoked) == ("laptop", "account-1", None)
    assert keys.check(records, text) == key
    assert keys.check(records, f"tml-{text}") == key


@pytest.mark.parametrize(
    "altered",
    [
        lambda text: "",
        lambda text: "tml-",
        lambda text: text[:-1],
        lambda text: text + "=",
        lambda text: text.swapcase(),
        lambda text: f" {text}",
        lambda text: f"tml-tml-{text}",
        lambda text: keys.key_sha256(text),
        lambda text: keys.new_key(),
        lambda text: f"{text}\0",
        lambda text: f"{text}\udcff é",
    ],
)
def test_no_other_text_opens(records: Records, altered: object) -> None:
    _, text = keys.create(records)
    assert callable(altered)
    assert keys.check(records, altered(text)) is None


def test_a_revoked_key_opens_nothing_and_others_of_its_account_do(records: Records) -> None:
    (first, revoked), (second, text) = keys.create(records, "a", "mine"), keys.create(records, "b", "mine")
    assert records.revoke_key(first.key_id, now())
    assert keys.check(records, revoked) is None
    assert keys.check(records, text) == second


def test_a_key_has_an_account_of_its_own_unless_one_is_named(records: Records) -> None:
    made = [keys.create(records)[0] for _ in range(3)]
    assert len({key.account for key in made}) == len({key.key_id for key in made}) == 3
    assert records.keys() == made


def test_only_the_hash_of_a_key_is_on_the_disk(records: Records, tmp_path: Path) -> None:
    _, text = keys.create(records)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert keys.key_sha256(text).encode() in content
    assert text.removeprefix("fs-").encode() not in content


@pytest.mark.parametrize("account", ["", "Mine", "a/b", "..", "a_b", "a\n", "é", "a" * 64])
def test_an_account_that_cannot_be_one_is_refused(records: Records, account: str) -> None:
    with pytest.raises(ConfigError, match="1 to 63 of a-z, 0-9 and -") as caught:
        keys.create(records, account=account)
    assert repr(account) in str(caught.value)
    assert records.keys() == []


def test_an_account_may_have_63_characters(records: Records) -> None:
    account = "a-9" * 21
    assert keys.create(records, account=account)[0].account == account


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "x" * 101])
def test_a_name_that_would_spoil_the_list_is_refused(records: Records, name: str) -> None:
    with pytest.raises(ConfigError, match="at most 100 characters"):
        keys.create(records, name)
    assert records.keys() == []
