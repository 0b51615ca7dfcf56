from __future__ import annotations

import pytest
from pydantic import Field, ValidationError, field_validator

from firesteel.sdk import ConfigError
from training.utils.config import Settings, TensorBoardConfig, TrackioConfig, TrainerConfig, WandBConfig


class Inner(Settings):
    size: int = Field(1, ge=1)
    """Size."""


class Outer(Settings):
    name: str
    """Name."""
    rate: float = Field(0.1, gt=0)
    """Rate."""
    inner: Inner = Inner()
    """Inner."""
    trainer: TrainerConfig = TrainerConfig()
    """Trainer."""

    @field_validator("name")
    @classmethod
    def _no_spaces(cls, name: str) -> str:
        if " " in name:
            raise ValueError("must not hold spaces")
        return name


def message_of(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Outer(**values)
    assert caught.value.__cause__ is None
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_values_are_taken() -> None:
    made = Outer(name="a", inner={"size": 3}, trainer=TrainerConfig(training_shape_id="s"))
    assert (made.rate, made.inner.size, made.trainer.training_shape_id) == (0.1, 3, "s")


def test_an_unknown_setting_is_refused_by_its_name() -> None:
    assert message_of(name="a", rat=3) == "rat: Outer has no such setting"


def test_a_missing_setting_is_named() -> None:
    assert message_of() == "name: must be given"


def test_a_wrong_value_is_refused_with_field_value_and_what_was_expected() -> None:
    said = message_of(name="a", rate=-2)
    assert said.startswith("rate: ")
    assert "greater than 0" in said
    assert said.endswith("(got -2)")
    assert message_of(name="a b") == "name: must not hold spaces (got 'a b')"
    assert message_of(name=3).startswith("name: ")


def test_every_wrong_setting_is_told_at_once() -> None:
    said = message_of(rate="x", other=1).splitlines()
    assert [line.split(":")[0] for line in said] == ["name", "rate", "other"]


@pytest.mark.parametrize(("inner", "part"), [({"size": 0}, "(got 0)"), ({"sise": 1}, "no such setting")])
def test_a_setting_inside_another_is_named_with_its_path(inner: dict[str, int], part: str) -> None:
    said = message_of(name="a", inner=inner)
    assert said.startswith(f"inner.{next(iter(inner))}: ")
    assert said.endswith(part)
    assert "{" not in said  # the value of the setting, not of all around it


def test_settings_cannot_be_changed_afterwards() -> None:
    made = Outer(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "b"  # type: ignore[misc]


def test_the_errors_are_of_the_standard_kind_too() -> None:
    with pytest.raises(ValueError, match="TrainerConfig has no such setting"):
        TrainerConfig(accelerator_count=8)


def test_the_guides_configs_take_the_guides_settings() -> None:
    assert (
        TrainerConfig(training_shape_id="a", reference_training_shape_id="b").reference_training_shape_id
        == "b"
    )
    assert TrainerConfig().training_shape_id is None
    assert WandBConfig(entity="e", project="p", run_name="r").project == "p"
    assert WandBConfig().project is None


@pytest.mark.parametrize("kind", [TrainerConfig, WandBConfig, TrackioConfig, TensorBoardConfig])
def test_every_setting_says_what_it_is(kind: type[Settings]) -> None:
    assert all(field.description for field in kind.model_fields.values())
