"""Numbers out of range, in every option of every command that takes one, are refused in one line."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
from bag_factory import make_bags, make_cohort
from model_factory import ColorEncoder, make_model, write_textured_slide
from typer.testing import CliRunner

from hdmil_lib.cli import app

ARGUMENTS = {
    "add-patches": "bags slide.tif",
    "calibrate": "--model model --cohort cohort.csv --bags bags --out calibrated",
    "doctor": "slide.tif",
    "extract": "slide.tif --out new",
    "fetch": "camelyon16 --out fetched --show",
    "fetch-tiles": "pcam tiles",
    "import": "other --from clam --out imported",
    "predict": "slide.tif --model model",
    "report": "slide.tif --out report",
    "reproduce": "camelyon16 --dir paper",
    "samples": "--out samples",
    "tissue": "slide.tif",
    "train": "--cohort cohort.csv --bags bags --out trained --epochs 1",
}
"""What else the commands with numbers are given, all of it good."""

NOT_ZERO = {
    "--delta",
    "--epochs",
    "--folds",
    "--force-mpp",
    "--jobs",
    "--look",
    "--mpp",
    "--n-slides",
    "--slides",
}
NOT_ZERO |= {
    "--batch-size",
    "--max-tiles",
    "--per-class",
    "--tile-mpp",
    "--tile-size",
    "--timed",
    "--workers",
}
"""Options for which zero is no sensible value either."""


class NumericOption(NamedTuple):
    """An option that takes a number."""

    command: str
    name: str
    kind: type


def numeric_options() -> Iterator[NumericOption]:
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and (kind := number_of(get_args(hint)[0])) is not None:
                (info,) = get_args(hint)[1:]
                declared = [text for text in info.param_decls or () if text.startswith("--")]
                option = declared[0] if declared else f"--{name.replace('_', '-')}"
                yield NumericOption(command.name or command.callback.__name__.replace("_", "-"), option, kind)


def number_of(hint: Any) -> type | None:
    """int or float, if a parameter of this type takes a number."""
    if get_origin(hint) in (types.UnionType, Union, list):
        return next((kind for kind in map(number_of, get_args(hint)) if kind is not None), None)
    return hint if hint in (int, float) else None


OPTIONS = sorted(numeric_options(), key=lambda option: option[:2])


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory) -> Path:
    """A working folder with one of everything."""
    folder = tmp_path_factory.mktemp("work")
    slide = write_textured_slide(folder / "slide.tif")
    make_cohort(folder, *make_bags(12))
    make_model(slide).save_pretrained(folder / "model")
    (folder / "other").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hdmil_lib.encoders.loading.load_encoder", lambda *a, **k: ColorEncoder())
        patch.chdir(folder)
        yield folder


def test_the_commands_with_numbers_are_known():
    assert {option.command for option in OPTIONS} == set(ARGUMENTS)
    assert {option.name for option in OPTIONS} >= NOT_ZERO
    assert len(OPTIONS) > 40


def check_refused(command: str, *options: str) -> None:
    """The command says in one line what is wrong: a usage error of typer, or an error of ours."""
    result = CliRunner().invoke(app, [command, *ARGUMENTS[command].split(), *options])
    assert result.exit_code in (1, 2), f"{options}: exit code {result.exit_code}\n{result.output}"
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.output


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.command} {option.name}")
def test_numbers_out_of_range_are_refused(option):
    values = ["-1", "x"] + ["0"] * (option.name in NOT_ZERO)
    values += ["nan"] if option.kind is float else ["1.5"]
    values += ["inf"] * (option.kind is float and option.name != "--max-seconds")
    for value in values:
        check_refused(option.command, option.name, value)
