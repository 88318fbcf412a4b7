"""What the planner has to know: of a model, of a case, and of the input that the case is made from. Pure numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nnunet_lowmem.types import Place, Shape3, shape3
from nnunet_lowmem.window.tiling import TileGrid


@dataclass(frozen=True)
class ModelFacts:
    """What the planner needs to know of a model.

    Attributes
    ----------
    heads, channels, folds : int
    weight_bytes : int
        Of one fold's weights, as far as they are not yet where the network runs.
    activation_bytes : int
        Peak of the network on one tile, with the input, the head's output and its mirrored copies.
    label_bytes : int
        Of one voxel of the label map.
    unmeasured_bytes : int
        What the network may take beyond `activation_bytes`, as long as none of its tiles has been measured.
    reused_bytes : int
        Of the output of a constant tile that is kept for the others.
    kept_bytes : int
        The weights of all folds between predictions, as far as they can be moved from RAM to disk.
    kept_place : Place or None
        Where they are, if that is decided: what has been moved does not come back.
    threads : int
        Threads of the compiled kernels.
    worker_bytes : int
        Of a process that preprocesses the next case meanwhile; 0 without one.
    device : str
        Type of the network's device: "cpu", "cuda" or "mps".
    window_on_device : bool
        False keeps the window in RAM whatever fits (``--not_on_device``).
    tile_s : float
        Seconds that the network takes for a tile; 0 as long as none is measured.
    """

    heads: int
    channels: int
    folds: int
    weight_bytes: int
    activation_bytes: int
    label_bytes: int
    unmeasured_bytes: int = 0
    reused_bytes: int = 0
    kept_bytes: int = 0
    kept_place: Place | None = None
    threads: int = 1
    worker_bytes: int = 0
    device: str = "cpu"
    window_on_device: bool = True
    tile_s: float = 0.0


@dataclass(frozen=True)
class InputFacts:
    """The input image, as it is until it is preprocessed.

    Attributes
    ----------
    kept_bytes : int
        In RAM.
    spilled_bytes : int or None
        On disk, if it is not in RAM: nothing where it is read from its files part by part. None where it has to be in
        RAM.
    block_bytes : int
        What is read of it at a time there.
    is_image : bool
        There it is the preprocessed image as well: tiles are normalised when they are read.
    mask_bytes : int
        Of the mask of where to normalise, which is where the input is.
    tile_voxel_bytes : int
        What it takes in RAM, where there is no other image, of a voxel of a tile on its way.
    place : Place or None
        Where it is, once it is read.
    """

    kept_bytes: int = 0
    spilled_bytes: int | None = None
    block_bytes: int = 0
    is_image: bool = False
    mask_bytes: int = 0
    tile_voxel_bytes: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class CaseFacts:
    """What the planner needs to know of a case.

    Attributes
    ----------
    name : str
    grid : TileGrid
    original_shape, cropped_shape : int, 3
    streams : bool
        The resampling of logits is known as tables, so that no head is needed as a whole.
    reading_bytes, preprocessing_bytes : int
        Beside the input image: while files are read; working arrays of preprocessing.
    image_bytes : int
        The preprocessed image.
    previous_stage_bytes : int
        Labels of the previous stage of a cascade, in network space.
    export_bytes : int
        Working arrays where heads are needed as a whole.
    image_place : Place or None
        Where the preprocessed image is, once it exists.
    next_stages_bytes : int
        Labels for the next stages of a cascade, which are made along with a validation.
    held_logits_bytes : int
        All logits, where somebody else makes them.
    region_bytes : int
        The mask of the region that is asked for.
    region_reading_bytes : int
        Peak while that mask is read, which is before the image is.
    input : InputFacts
    writer_bytes : int
        What writing the label map takes beside the map.
    tiles, tiles_of_case : int
        How many tiles are computed for a fold, and how many the whole case has.
    may_be_cut : bool
        Into columns: slabs are labelled as they come, and nobody needs whole ones.
    leaves, leaves_in_columns : bool
        Labels can go to their file as they become final, and nothing is kept of them; in columns as well.
    """

    name: str
    grid: TileGrid
    original_shape: Shape3
    cropped_shape: Shape3
    streams: bool
    reading_bytes: int
    preprocessing_bytes: int
    image_bytes: int
    previous_stage_bytes: int = 0
    export_bytes: int = 0
    image_place: Place | None = None
    next_stages_bytes: int = 0
    held_logits_bytes: int = 0
    region_bytes: int = 0
    region_reading_bytes: int = 0
    input: InputFacts = InputFacts()
    writer_bytes: int = 0
    tiles: int = 0
    tiles_of_case: int = 0
    may_be_cut: bool = False
    leaves: bool = False
    leaves_in_columns: bool = False

    def kept(self) -> CaseFacts:
        """Return the facts of a case whose labels somebody looks at as a whole."""
        return replace(self, leaves=False, leaves_in_columns=False)

    def cut(self, columns: Shape3) -> CaseFacts:
        """Return the facts of the largest of several columns; tiles are those of all."""
        if columns == (1, 1, 1):
            return self
        grid, share = self.grid.cut(columns)
        sizes = zip(self.cropped_shape, grid.image_shape, self.grid.image_shape, strict=True)
        cropped = [size if piece == whole else min(size, size * piece // whole + 2) for size, piece, whole in sizes]
        return replace(self, grid=grid, cropped_shape=shape3(cropped), tiles=round(share * self.tiles))
