"""Each option is told of once, and what is made of that is the same everywhere."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.commands import cli
from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.nnunet import predictors
from nnunet_lowmem.options import OPTIONS, WITH_FLAG, Options, table

PAGE = Path(__file__).parent.parent / "docs" / "options.md"


def test_table_of_the_docs_is_made_of_the_list():
    assert "\n".join(table()) in PAGE.read_text()


def test_constructor_takes_each_by_name_and_keeps_it():
    parameters = inspect.signature(LowMemPredictor).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in keywords] == [(option.name, option.default) for option in OPTIONS]
    marks = {option.name: object() for option in OPTIONS if option.name != "fast"}  # which is for the CPU alone
    predictor = LowMemPredictor(**marks)
    assert {name: getattr(predictor, name) for name in marks} == marks


def test_each_flag_gives_its_option():
    for option in WITH_FLAG:
        words = [option.metadata["flag"]]
        if option.type != "bool":
            values = option.metadata["words"].get("choices", ("7",))[-1:]
            words += values * option.metadata["words"].get("nargs", 1) if option.name == "spacing" else values
        given = cli.predict_parser().parse_args(["-i", "in", "-o", "out", *words])
        assert [other.name for other in WITH_FLAG if getattr(given, other.name) is not None] == [option.name]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_variables_and_plans_give_what_is_no_callback(option, monkeypatch):
    text = {"bool": "true", "bool | None": "true", "bool | str": "bfloat16"}.get(option.type, "1")
    monkeypatch.setenv(f"nnUNet_lowmem_{option.name}", text)
    if "Callable" in option.type:
        with pytest.raises(UsageError, match="has no option"):
            predictors.options("lowmem", LowMemPredictor)
        return
    assert set(predictors.options("lowmem", LowMemPredictor)) == {option.name}
    monkeypatch.undo()
    plans = {"predictor": "lowmem", "predictor_options": {option.name: text}}
    if option.metadata["for_models"]:
        assert set(predictors.options("lowmem", LowMemPredictor, plans)) == {option.name}
    else:
        with pytest.raises(UsageError, match="not for a model"):
            predictors.options("lowmem", LowMemPredictor, plans)


def test_a_derived_class_that_does_not_call_the_constructor_has_them_all():
    class Own(LowMemPredictor):
        def __init__(self) -> None:
            pass

    assert all(getattr(Own(), option.name) == getattr(Options, option.name) == option.default for option in OPTIONS)
