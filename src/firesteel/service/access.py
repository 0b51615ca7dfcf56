"""Who a request is from and where it goes: what every route asks first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Request

from firesteel.sdk.errors import AuthError
from firesteel.service import keys
from firesteel.service.service import Service
from firesteel.service.sessions import Place

NO_AUTH_ACCOUNT = "local"
# Where the door leaves whose key a request carries.
ACCOUNT = "firesteel.account"
_OPEN = ("/healthz", "/metrics", "/docs", "/openapi.json")


class Unauthenticated(AuthError):
    """No key, or one that is not known."""


def service_of(request: Request) -> Service:
    """The service behind this server."""
    service: Service = request.app.state.service
    return service


def authenticate(headers: Mapping[str, str], service: Service) -> str:
    """Whose key these headers carry. Raises `Unauthenticated`."""
    text = headers.get("x-api-key", "")
    if not text:
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        text = rest if scheme.lower() == "bearer" else ""
    if not text:
        raise Unauthenticated(
            "a key is needed: X-API-Key, or Authorization: Bearer (FIRESTEEL_API_KEY at our client)"
        )
    key = keys.check(service.records, text.strip())
    if key is None:
        raise Unauthenticated("this key is not known here, or was revoked; `firesteel keys create` makes one")
    return key.account


def is_open(path: str) -> bool:
    """Whether an address may be asked without a key. What needs an account asks for one all the same."""
    return path in _OPEN or path.endswith("/api/v1/healthz")


async def account_of(request: Request) -> str:
    """Whose key a request carries. Raises `Unauthenticated`."""
    account: str | None = request.scope.get(ACCOUNT)
    if account is None:
        raise Unauthenticated("a key is needed here")
    return account


def here(request: Request, account: Annotated[str, Depends(account_of)]) -> Place:
    """The place that a request to the data plane goes to; its job, if it has one, is there and running."""
    job_id = request.path_params.get("job")
    if job_id is None:
        return Place(account)
    refuse_other_account(request.path_params["account"], account)
    place = Place(account, job_id)
    service_of(request).jobs.use(place)
    return place


def refuse_other_account(named: str, account: str) -> None:
    """Raise `AuthError` for an address in another account."""
    if named != account:
        raise AuthError(f"account {named!r} is not that of this key, which is {account!r}")


Here = Annotated[Place, Depends(here)]
Account = Annotated[str, Depends(account_of)]
Served = Annotated[Service, Depends(service_of)]
