"""API keys: made here, shown once, and kept as a hash.

A plain SHA-256 is enough: the text is 256 random bits, which no list of common passwords and no computer finds.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from firesteel.sdk.errors import ConfigError
from firesteel.service.records import Key, Records, now

_ACCOUNT = re.compile(r"[a-z0-9-]{1,63}")
_NAME_LENGTH = 100


def new_key() -> str:
    """The text of a new key: `fs-` and 256 random bits."""
    return f"fs-{secrets.token_urlsafe(32)}"


def key_sha256(text: str) -> str:
    """What is kept of a key.

    A `tml-` before it is ignored: there are clients that send no key without one.
    """
    return hashlib.sha256(text.removeprefix("tml-").encode("utf-8", "surrogatepass")).hexdigest()


def check(records: Records, text: str) -> Key | None:
    """The key with this text, or None if it is unknown or revoked."""
    key = records.find_key(key_sha256(text))
    return None if key is None or key.revoked is not None else key


def create(records: Records, name: str = "", account: str | None = None) -> tuple[Key, str]:
    """Make a key for an account, by default for a new one, and give its text, which is kept nowhere.

    Raises `ConfigError` for a name or an account that cannot be one.
    """
    account = f"account-{secrets.token_hex(6)}" if account is None else account
    if not _ACCOUNT.fullmatch(account):
        raise ConfigError(f"account {account!r}: expected 1 to 63 of a-z, 0-9 and -")
    if not name.isprintable() or len(name) > _NAME_LENGTH:
        raise ConfigError(f"name {name!r}: expected at most {_NAME_LENGTH} characters, all of them printable")
    text = new_key()
    key = Key(f"key-{secrets.token_hex(6)}", account, name, now(), None)
    records.add_key(key, key_sha256(text))
    return key, text
