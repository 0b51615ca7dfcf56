"""`firesteel serve` and `firesteel ps`: trainers behind HTTP, and what they are doing."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from firesteel.sdk.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks one that is free.")] = 8350,
    home: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and records [default FIRESTEEL_HOME/service].")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Where records are kept: sqlite:///FILE or postgresql://… [default in --home]."),
    ] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(help="Offer this model; give it again for more [default any name].")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no key; on loopback only.")] = False,
    max_models: Annotated[int, typer.Option(min=1, help="Most models in memory at a time.")] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in MB.")] = 64,
    session_seconds: Annotated[
        float, typer.Option(min=1, help="A session that is silent for longer is ended, its models freed.")
    ] = 300.0,
) -> None:
    """Serve trainers over HTTP, for Firesteel's own client, `tinker` and the Fireworks SDK."""
    need_server()
    if no_auth and host not in LOOPBACK:
        raise ConfigError(
            f"--no-auth: allowed on loopback only, not on {host}; leave it out, or --host 127.0.0.1"
        )
    from firesteel.service.records import Records, default_database
    from firesteel.service.server import Settings, listen, run_server
    from firesteel.service.service import Limits

    folder = home_of(home)
    limits = Limits(body_bytes=max_body_mb * 10**6, models=max_models, session_seconds=session_seconds)
    records = Records.open(database or default_database(home))
    listening = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    typer.echo(f"firesteel serve: http://{name}:{listening.getsockname()[1]}")
    if not no_auth:
        _show_new_key(records)
    run_server(Settings(folder, records, tuple(base_model or ()), limits, no_auth), listening)


def home_of(home: Path | None) -> Path:
    """Where the service keeps what it keeps."""
    from firesteel import store

    return (home.expanduser() if home is not None else store.home() / "service").absolute()


def need_server() -> None:
    """Raise `ConfigError` unless the packages of the server are installed."""
    missing = [
        name for name in ("fastapi", "uvicorn", "sqlalchemy", "alembic") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed; run `pip install 'firesteel[server]'`")


def _show_new_key(records: Any) -> None:
    """A first start makes a key; it is shown now and never again."""
    from firesteel.service import keys

    if records.keys():  # also where all were revoked: whoever did that meant it
        typer.echo("keys: `firesteel keys list`; a lost one is replaced by `firesteel keys create`")
        return
    key, text = keys.create(records, "first")
    typer.echo(f"key: {text}")
    typer.echo(f"(account {key.account}; shown once. Clients read it from FIRESTEEL_API_KEY)")


def ps(
    url: Annotated[str | None, typer.Option(help="The server [default FIRESTEEL_BASE_URL].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show a server's trainers, sessions and queues."""
    import httpx2

    address = url or os.environ.get("FIRESTEEL_BASE_URL")
    if not address:
        raise ConfigError("--url: name the server, or set FIRESTEEL_BASE_URL")
    headers = {"x-api-key": os.environ.get("FIRESTEEL_API_KEY", "")}
    try:
        answer = httpx2.get(f"{address.rstrip('/')}/status", headers=headers, timeout=30)
        content = answer.json()
    except (httpx2.HTTPError, ValueError) as error:
        raise ConfigError(f"{address}: {error}; is `firesteel serve` running there?") from error
    if answer.status_code != 200:
        raise ConfigError(f"{address}: {content.get('error', {}).get('message', content)}")
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"{content['waiting']} operations wait, {content['resident_bytes'] / 2**20:,.0f} MiB")
    for job in content["jobs"]:
        typer.echo(f"job {job['job']}: {job['state']}, {job['base_model']}, rank {job['lora_rank']}")
    for session in content["sessions"]:
        where = f" of job {session['job']}" if session["job"] else ""
        typer.echo(f"session {session['session']}{where}: {session['waiting']} wait")
        for model in session["models"]:
            kind = "frozen" if not model["trainable"] else f"rank {model['lora_rank']}"
            typer.echo(f"  model {model['model']}: {model['base_model']}, {kind}")
