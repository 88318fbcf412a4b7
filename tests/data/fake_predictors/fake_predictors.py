"""A predictor of another package: stock's, which says that it was here."""

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


class EchoPredictor(nnUNetPredictor):
    def __init__(self, *args, volume: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.volume = volume
