from __future__ import annotations

from pathlib import Path

import pytest

from firesteel.catalog import Catalog, Mode, ModelEntry, TrainingShape, load_catalog
from firesteel.sdk.errors import ConfigError, ModelError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a catalogue file, name it in the environment, load."""

    def write_and_load(text: str) -> Catalog:
        file = tmp_path / "catalog.yaml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv("FIRESTEEL_CATALOG", str(file))
        return load_catalog()

    return write_and_load


@pytest.fixture(autouse=True)
def _no_catalogue_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIRESTEEL_CATALOG", raising=False)


def shape(name: str, base_model: str = "*", device: str = "cpu", **settings: object) -> TrainingShape:
    return TrainingShape(name, base_model, device, "float32", Mode.LORA_TRAINER, **settings)  # type: ignore[arg-type]


def catalog_of(*shapes: TrainingShape) -> Catalog:
    return Catalog({}, {item.name: item for item in shapes})


def choose(catalog: Catalog, min_context: int | None = None, devices: tuple[str, ...] = ("cpu",)) -> str:
    return catalog.select_shape("chat", Mode.LORA_TRAINER, min_context, devices).name


def test_the_built_in_catalogue_has_the_models_and_a_shape_of_each_mode_on_each_device() -> None:
    catalog = load_catalog()
    assert set(catalog.models) == {"tiny-llama", "smollm2-135m-instruct"}
    assert catalog.resolve_model("smollm2-135m-instruct").kind == "pypi"
    for mode in Mode:
        assert catalog.select_shape("tiny-llama", mode, 1024, ["cpu"]).dtype == "float32"
        # Weights that are trained stay in float32, where small steps are not rounded away.
        on_gpu = "float32" if mode is Mode.POLICY_TRAINER else "bfloat16"
        assert catalog.select_shape("tiny-llama", mode, 1024, ["cuda", "cpu"]).dtype == on_gpu


def test_a_catalogue_file_adds_entries_and_replaces_those_of_the_same_name(write) -> None:
    catalog = write(
        "models:\n  mine: {source: org/mine, revision: abc}\n  tiny-llama: {source: org/other-tiny}\n"
        "shapes:\n  small: {base_model: mine, mode: LORA_TRAINER, device: cpu, dtype: float32}\n"
    )
    assert catalog.resolve_model("mine") == ModelEntry("mine", "org/mine", revision="abc")
    assert catalog.resolve_model("tiny-llama").source == "org/other-tiny"
    assert catalog.resolve_model("smollm2-135m-instruct").kind == "pypi"
    assert catalog.shape("small").base_model == "mine"
    assert catalog.shape("accounts/local/trainingShapes/cpu-lora").mode is Mode.LORA_TRAINER


def test_a_name_may_stand_for_another_name(write) -> None:
    catalog = write("models:\n  accounts/a/models/x: {source: y}\n  y: {source: smollm2-135m-instruct}\n")
    assert catalog.resolve_model("accounts/a/models/x").name == "smollm2-135m-instruct"


def test_an_entry_named_like_its_own_hub_id_is_not_a_circle(write) -> None:
    catalog = write("models:\n  org/chat: {source: org/chat, trust_remote_code: true}\n")
    assert catalog.resolve_model("org/chat").trust_remote_code


def test_names_that_lead_back_to_themselves_are_refused_with_the_whole_circle(write) -> None:
    catalog = write("models:\n  a: {source: b}\n  b: {source: c}\n  c: {source: b}\n")
    with pytest.raises(ModelError, match="a → b → c → b"):
        catalog.resolve_model("a")


def test_settings_that_another_name_would_ignore_are_refused(write) -> None:
    catalog = write("models:\n  a: {source: tiny-llama, revision: main}\n")
    with pytest.raises(ModelError, match="another name for 'tiny-llama'"):
        catalog.resolve_model("a")


def test_relative_paths_start_from_the_catalogue_file(write, tmp_path: Path) -> None:
    (tmp_path / "weights" / "chat").mkdir(parents=True)
    catalog = write(
        "models:\n  folder: {source: weights/chat}\n  dotted: {source: ../elsewhere}\n"
        f"  gguf: {{source: weights/x.gguf, sha256: {'a' * 64}}}\n"
    )
    assert catalog.models["folder"].source == str(tmp_path / "weights" / "chat")
    assert catalog.models["dotted"].source == str(tmp_path.parent / "elsewhere")
    assert catalog.models["gguf"].source == str(tmp_path / "weights" / "x.gguf")
    assert catalog.models["gguf"].kind == "gguf"


def test_a_folder_where_the_user_stands_does_not_take_the_place_of_a_catalogued_hub_id(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = write("models:\n  chat: {source: org/chat}\n")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "org" / "chat").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert catalog.resolve_model("chat").kind == "hub"
    assert catalog.resolve_model("org/chat").source == str(elsewhere / "org" / "chat")


def test_folders_gguf_files_and_hub_ids_need_no_entry(tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.touch()
    kinds = [load_catalog().resolve_model(name).kind for name in (str(tmp_path), str(gguf), "org/name")]
    assert kinds == ["folder", "gguf", "hub"]


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*/gone"):
        load_catalog().resolve_model(str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"there is no file .*/gone.gguf"):
        load_catalog().resolve_model(str(tmp_path / "gone.gguf"))


@pytest.mark.parametrize(
    "name", ["accounts/fireworks/models/smollm2-135m", "accounts/x", "gpt2", "pypi:x==1"]
)
def test_an_unknown_model_names_the_catalogue_entry_to_add(name: str) -> None:
    with pytest.raises(ModelError) as raised:
        load_catalog().resolve_model(name)
    assert f"models:\n  {name}:\n    source:" in str(raised.value)
    assert "FIRESTEEL_CATALOG" in str(raised.value)


def test_a_name_close_to_a_known_one_is_suggested() -> None:
    with pytest.raises(ModelError, match="Did you mean smollm2-135m-instruct"):
        load_catalog().resolve_model("accounts/fireworks/models/smollm2-135m-instruct-v1")
    with pytest.raises(ModelError, match=r"Did you mean .*cpu-policy"):
        load_catalog().shape("cpu-polcy")


def test_an_unknown_shape_names_the_catalogue_entry_to_add(write, tmp_path: Path) -> None:
    catalog = write("")
    with pytest.raises(ModelError) as raised:
        catalog.shape("accounts/acme/trainingShapes/h200")
    assert "shapes:\n  accounts/acme/trainingShapes/h200:\n    base_model:" in str(raised.value)
    assert str(tmp_path / "catalog.yaml") in str(raised.value)


def test_a_shape_may_be_named_with_its_version_and_only_with_that_one() -> None:
    name = "accounts/local/trainingShapes/cpu-lora"
    assert load_catalog().shape(f"{name}/versions/1") == load_catalog().shape(name)
    with pytest.raises(ModelError, match="is at version 1, not 2"):
        load_catalog().shape(f"{name}/versions/2")


def test_a_shape_for_the_model_comes_before_one_for_any_model_even_on_a_later_device() -> None:
    catalog = catalog_of(shape("any", device="cuda"), shape("exact", "chat"))
    assert choose(catalog, devices=("cuda", "cpu")) == "exact"


def test_an_earlier_device_comes_before_a_later_one_even_with_more_context() -> None:
    catalog = catalog_of(shape("cpu", max_context_length=512), shape("gpu", device="cuda"))
    assert choose(catalog, devices=("cuda", "cpu")) == "gpu"
    assert choose(catalog, devices=("cpu", "cuda")) == "cpu"


def test_the_smallest_sufficient_context_is_chosen_and_the_models_own_counts_as_the_largest() -> None:
    catalog = catalog_of(
        shape("own"), shape("8k", max_context_length=8192), shape("2k", max_context_length=2048)
    )
    assert choose(catalog) == "2k"
    assert choose(catalog, 2048) == "2k"
    assert choose(catalog, 2049) == "8k"
    assert choose(catalog, 8193) == "own"


def test_where_no_shape_fits_the_error_says_why_for_each() -> None:
    catalog = catalog_of(
        shape("other", "another-model"),
        shape("gpu", device="cuda"),
        shape("short", max_context_length=100),
        shape("draft", validated=False),
    )
    with pytest.raises(ModelError) as raised:
        choose(catalog, 200)
    for reason in (
        "other: is for 'another-model'",
        "gpu: needs cuda",
        "short: holds 100 tokens",
        "draft: is not validated",
    ):
        assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:\n  a: {source: org/a, sorce: b}\n", "models: a: sorce: unknown key"),
        ("models:\n  a: {name: b, source: org/a}\n", "models: a: name: unknown key"),
        ("models:\n  a: {revision: main}\n", "models: a: source: missing"),
        ("models:\n  a: {source: 3}\n", "models: a: source: 3: "),
        ("models:\n  a: org/a\n", "models: a: expected settings"),
        ("models: [a]\n", "models: expected names"),
        ("model:\n  a: {source: org/a}\n", "unknown section 'model'"),
        ("- a\n", "expected the sections"),
        ("models: {\n", "is not YAML"),
        ("models:\n  a: {source: org/a}\n  a: {source: org/b}\n", "'a' is there twice"),
        ("models:\n  1: {source: org/a}\n", "1 is no text; put a key in quotes"),
        ("models:\n  a: {source: 'pypi:x==1'}\n", "models: a: source: 'pypi:x==1' is a kind for built-in"),
        ("models:\n  a: {source: ./x, revision: main}\n", "models: a: revision 'main' applies to"),
        ("models:\n  a: {source: x.gguf, sha256: abc}\n", "models: a: sha256 'abc' is not 64"),
        ("models:\n  a: {source: org/a, sha256: abc}\n", "models: a: sha256 is that of a GGUF file"),
        ("models:\n  a: {source: x.gguf, trust_remote_code: true}\n", "models: a: trust_remote_code applies"),
        (
            "shapes:\n  s: {base_model: '*', mode: TRAINER, device: cpu, dtype: float32}\n",
            "shapes: s: mode: 'TRAINER'",
        ),
        (
            "shapes:\n  s: {base_model: '*', mode: FORWARD_ONLY, device: tpu, dtype: float32}\n",
            "shapes: s: device: 'tpu'",
        ),
        (
            "shapes:\n  s: {base_model: '*', mode: FORWARD_ONLY, device: cpu, dtype: float32, "
            "max_context_length: 0}\n",
            "shapes: s: max_context_length 0",
        ),
    ],
)
def test_a_mistake_in_a_catalogue_file_is_named_by_file_entry_and_key(
    write, tmp_path: Path, text, expected
) -> None:
    with pytest.raises(ConfigError) as raised:
        write(text)
    assert str(raised.value).startswith(f"{tmp_path / 'catalog.yaml'}: ")
    assert expected in str(raised.value)


def test_a_catalogue_file_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRESTEEL_CATALOG", "/nowhere/catalog.yaml")
    with pytest.raises(ConfigError, match=r"/nowhere/catalog.yaml: there is no such file; FIRESTEEL_CATALOG"):
        load_catalog()


def test_yaml_defaults_by_anchor_may_be_overridden(write) -> None:
    catalog = write(
        "shapes:\n"
        "  a: &a {base_model: '*', mode: LORA_TRAINER, device: cpu, dtype: float32}\n"
        "  b: {<<: *a, dtype: float64}\n"
    )
    assert (catalog.shape("b").dtype, catalog.shape("b").device) == ("float64", "cpu")
