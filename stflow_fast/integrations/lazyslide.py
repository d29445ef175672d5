"""The model as LazySlide wants one that predicts from features of tiles: ``lazyslide.tl.feature_prediction``.

Written against ``FeaturePredictionModelProtocol`` of lazyslide-models 0.1.0 and the runner of LazySlide 0.13.0. It is a
structural protocol, so nothing of either is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arrays import as_array
from ..cohort import SamplingConfig, gene_names, model_and_origin
from ..devices import choose_device
from ..errors import InputError
from ..model import Denoiser
from ..slides import Slide


class STFlowPredictor:
    """Predicts the expression of every tile of a slide, for ``lazyslide.tl.feature_prediction(wsi, predictor)``.

    Attributes:
        name: LazySlide stores the prediction as the table ``stflow_tiles``, unless ``key_added`` says otherwise.
        needs_coords, whole_slide: LazySlide gives coordinates, and all tiles in one call.
        features_model_name: the encoder that the model was trained with, as its run calls it; LazySlide takes the table
            ``{features_model_name}_tiles`` where it is told no ``feature_key``. None where the model does not know.
        model: the network.
        slide_id: with the seed, and a tile's row in the table, decides the noise. LazySlide does not say which slide it
            is, so all have this id until it is set anew. With the store's name without ``.zarr`` the prediction is that
            of ``stflow-fast predict`` for the store.
    """

    name = "stflow"
    needs_coords = True
    whole_slide = True

    def __init__(
        self, run: str | Path | Denoiser, sampling: SamplingConfig | None = None, slide_id: str = "wsi"
    ) -> None:
        """
        Args:
            run: a run or model folder, a repository of the Hugging Face Hub, or a model.
            sampling: how to draw; its precision, too, whatever LazySlide's ``amp`` says.
            slide_id: see the attribute.

        Raises:
            InputError: no model there, a truncated one, or a run that has not finished.
        """
        self.model, _ = model_and_origin(run, "cpu")
        self.features_model_name = self.model.provenance.encoder or None
        self.slide_id = slide_id
        self._sampling = sampling or SamplingConfig()

    def predict(self, features: Any, coords: Any = None) -> dict[str, np.ndarray]:
        """One sample of the slide.

        Args:
            features: [N, F] embeddings of the tiles, of any make.
            coords: [N, 2] corners or centres (x, y) of tiles of one size, in level-0 pixels. LazySlide gives the upper
                left corners of their bounds. Half a tile's shift, as every other one, changes nothing, and neither does
                turning or mirroring; a scale does: the model was trained with distances in level-0 pixels.

        Returns:
            The values [N] float32 of each gene by its name, in the order of the model and the unit of the training
            (log1p counts, unless the model says otherwise).

        Raises:
            InputError: no coordinates, features of another size than the model's, or what Slide refuses: NaN, shapes
                that disagree, no tiles.
        """
        if coords is None:
            raise InputError("coords: the model needs them; give the corners of the tiles [N, 2] in level-0 pixels")
        features = as_array(f"slide {self.slide_id}: features", features, ("N", "F"), np.float32)
        slide = Slide(self.slide_id, features, coords, np.arange(len(features)).astype(str))
        expression = self._sampling.drawer(self.model)(slide).expression.float().numpy()
        return dict(zip(gene_names(self.model), expression.T, strict=True))

    def to(self, device: str | torch.device) -> STFlowPredictor:
        """Move the model, which LazySlide does before it predicts.

        Raises:
            InputError: neither the CPU nor a CUDA device that is there.
        """
        self.model.to(choose_device(str(device)))
        return self

    def get_transform(self) -> None:
        """There is none: images are of the encoder."""
        return None

    def try_compile(self, **compile_kws: Any) -> None:
        """Compiles nothing, as LazySlide allows: the numbers would differ. ``stflow_fast.use_compile`` does."""
