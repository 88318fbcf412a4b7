"""A model's plans for cases that are read, or written, by another class than the plans name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_lowmem.errors import UsageError
from nnunet_lowmem.preprocessing.reading import library_of
from nnunet_lowmem.preprocessing.volume_io import volume_io
from nnunet_lowmem.volumes.formats import check_writable
from nnunet_lowmem.volumes.headers import Library
from nnunet_lowmem.volumes.selection import OWN, Selection

_TURNS = "Reorient"


def turns(reader: type) -> bool:
    """Whether a reader class of nnU-Net's gives images in other axes than their files have."""
    return _TURNS in reader.__name__


class PlansReadBy:
    """nnU-Net's plans manager, but for who reads images and writes labels.

    Parameters
    ----------
    plans_manager : PlansManager
        All else is asked of it.
    reader : type
    writer : object
        An instance.
    """

    def __init__(self, plans_manager: Any, reader: type, writer: Any) -> None:
        self._plans_manager = plans_manager
        self.image_reader_writer_class, self.label_writer = reader, writer

    def __getattr__(self, name: str) -> Any:
        if name == "_plans_manager":  # of one that is being copied
            raise AttributeError(name)
        return getattr(self._plans_manager, name)


def writer_of(plans_manager: Any) -> Any:
    """Return what writes label maps: an instance of the class that plans name, or of another."""
    return getattr(plans_manager, "label_writer", None) or plans_manager.image_reader_writer_class()


def plans_read_by(
    plans_manager: Any,
    selection: Selection | None,
    ending: str,
    model_ending: str,
    classes: Mapping[int, str],
    made: Callable[[], Mapping[str, Any]],
) -> PlansReadBy:
    """Return plans by which volumes are read here, if they are selected, and labels written with an ending.

    Raises
    ------
    UsageError
        If the model's own reader is needed, and writes no such files.
    """
    own, by = plans_manager.image_reader_writer_class, None
    reader = own if selection is None else volume_io(selection)
    if ending.lower() in OWN and (selection is not None or ending != model_ending):
        check_writable(ending)
        by = volume_io(selection or Selection())(classes, made)
        if selection is None and turns(own):
            raise UsageError(
                f"the model's reader, {own.__name__}, turns images: its labels are written as {model_ending}"
            )
    elif selection is not None:
        by = SimpleITKIO()
    elif ending != model_ending and library_of(own) is not Library.ITK:
        raise UsageError(f"the model's reader, {own.__name__}, writes {model_ending}, and {ending} is asked for")
    return PlansReadBy(plans_manager, reader, by)
