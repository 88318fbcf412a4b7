"""One predictor for everything: attributes set after construction, one model after the other, several threads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from factory import ModelSpec
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from oracle import assert_same_object, make_predictor

from nnunet_lowmem import LowMemPredictor
from nnunet_lowmem.predict.jobs import Array, Files, Item, Job, Refused, Stored

SPECS = {
    "folds": ModelSpec(folds=(0, 1), mirror_axes=(2,)),
    "two classes": ModelSpec(labels=2),
    "many classes": ModelSpec(labels=9, patch_size=(24, 16, 16)),
    "plane": ModelSpec(patch_size=(32, 32), spacing=(4.2, 4.3)),
    "coarse": ModelSpec(spacing=(2.0, 2.0, 2.0)),
}


def array(images: Any) -> tuple[np.ndarray, dict]:
    return SimpleITKIO().read_images(list(images("small")))


def labels(predictor: Any, image: np.ndarray, properties: dict) -> Any:
    return predictor.predict_single_npy_array(image, dict(properties))


def test_five_models_in_turn(models, images):
    image = array(images)
    ours = make_predictor(LowMemPredictor, models(SPECS["folds"], images("small")), (0, 1))
    for spec in (*SPECS.values(), SPECS["folds"]):
        model = models(spec, images("small"))
        ours.initialize_from_trained_model_folder(model, spec.folds)
        stock = make_predictor(nnUNetPredictor, model, spec.folds)
        assert_same_object(labels(stock, *image), labels(ours, *image), str(spec))


def test_four_threads(models, images):
    image = array(images)
    model = models(SPECS["many classes"], images("small"))
    ours, stock = (make_predictor(cls, model) for cls in (LowMemPredictor, nnUNetPredictor))
    expected = labels(stock, *image)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: labels(ours, *image), range(8)))
    for result in made:
        assert_same_object(expected, result, "in a thread")


def other_order(predictor: Any) -> None:
    predictor.list_of_parameters = predictor.list_of_parameters[::-1] + predictor.list_of_parameters[:1]


SETTINGS: dict[str, Callable[[Any], object]] = {
    "step": lambda p: setattr(p, "tile_step_size", 1.0),
    "weights": lambda p: setattr(p, "use_gaussian", False),
    "mirroring": lambda p: setattr(p, "use_mirroring", False),
    "axes": lambda p: setattr(p, "allowed_mirroring_axes", np.array([0, 1])),
    "one fold": lambda p: p.list_of_parameters.pop(0),
    "order": other_order,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_attributes_set_after_a_case(models, images, name):
    image = array(images)
    model = models(SPECS["folds"], images("small"))
    results = []
    for cls in (nnUNetPredictor, LowMemPredictor):
        predictor = make_predictor(cls, model, (0, 1))
        before = labels(predictor, *image)
        SETTINGS[name](predictor)
        results.append((before, labels(predictor, *image)))
    for stock, ours in zip(*results, strict=True):
        assert_same_object(stock, ours, name)


@pytest.mark.parametrize(
    "source",
    [
        Files(["a_0000.nii.gz"], "a.nii.gz"),
        Array("an image", None, {"spacing": [1, 1, 1]}),
        Item("case.npy", {"spacing": [1, 1, 1]}),
        Stored("case"),
        Refused(ValueError, "why"),
    ],
)
def test_a_job_is_plain_data(source):
    job = Job("a", "out/a", source)
    assert pickle.loads(pickle.dumps(job)) == job
