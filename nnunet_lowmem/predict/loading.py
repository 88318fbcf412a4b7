"""The part of the predictor that gets a case from files or arrays: under the plan of the case that is under way."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_lowmem.budget.case_plan import CasePlanning
from nnunet_lowmem.nnunet import stock_calls
from nnunet_lowmem.predict.jobs import Job, job_of_item
from nnunet_lowmem.preprocessing.case import preprocess_array, preprocess_case
from nnunet_lowmem.types import PreprocessedCase


class CaseLoading:
    """Preprocesses with the threads, and into the memory, that the plan of the case says."""

    plans_manager: Any
    configuration_manager: Any
    dataset_json: Any
    verbose: bool
    verbose_preprocessing: bool
    accept_nan: bool
    _planning: CasePlanning | None = None

    @property
    def planning(self) -> CasePlanning:
        """Of the case that is under way."""
        assert self._planning is not None, "a case is planned before it is loaded"
        return self._planning

    def _preprocessing_options(self) -> dict[str, Any]:
        planning = self._planning
        return {
            "threads": 1 if planning is None else planning.threads,
            "allocate": np.empty if planning is None else planning.allocate,
            "verbose": self.verbose_preprocessing,
            "accept_nan": self.accept_nan,
        }

    def _job_of_array(
        self,
        name: str,
        image: NDArray[Any],
        previous_stage: NDArray[Any] | None,
        properties: dict[str, Any],
        output: str | None,
        by_adapter: bool = False,
    ) -> Job:
        """Make a case of an array; where nnU-Net's adapter is somebody else's, it has to be asked."""
        given = (image, previous_stage, properties)
        if by_adapter:
            return Job(name, output, partial(self._preprocess_by_adapter, *given))
        return Job(name, output, partial(self._preprocess_array, *given), array=given)

    def _preprocess_files(self, files: list[str], previous_stage: str | None) -> PreprocessedCase:
        return preprocess_case(
            files,
            previous_stage,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            **self._preprocessing_options(),
        )

    def _preprocess_array(
        self, image: NDArray[Any], previous_stage: NDArray[Any] | None, properties: dict[str, Any]
    ) -> PreprocessedCase:
        return preprocess_array(
            image,
            previous_stage,
            properties,
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            **self._preprocessing_options(),
        )

    def _preprocess_by_adapter(
        self, image: NDArray[Any], previous_stage: NDArray[Any] | None, properties: dict[str, Any]
    ) -> PreprocessedCase:
        item = stock_calls.item_of_adapter(
            image, previous_stage, properties, self.plans_manager, self.dataset_json, self.configuration_manager,
            self.verbose,
        )  # fmt: skip
        return job_of_item(item).load()
