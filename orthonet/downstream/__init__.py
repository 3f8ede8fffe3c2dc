"""What a proved constant gives beyond a radius: conformal sets, bands, and radii of pixels."""

from orthonet.downstream._bands import ConformalBand, calibrate_band, certified_interval
from orthonet.downstream._pixels import PixelAccuracy, certified_pixel_accuracy, pixel_radii
from orthonet.downstream._ranks import Coverage, conformal_quantile, share_bound
from orthonet.downstream._scores import conformal_scores, score_bounds, score_lipschitz
from orthonet.downstream._sets import ConformalSets, calibrate_sets

__all__ = [
    "ConformalBand",
    "ConformalSets",
    "Coverage",
    "PixelAccuracy",
    "calibrate_band",
    "calibrate_sets",
    "certified_interval",
    "certified_pixel_accuracy",
    "conformal_quantile",
    "conformal_scores",
    "pixel_radii",
    "score_bounds",
    "score_lipschitz",
    "share_bound",
]
