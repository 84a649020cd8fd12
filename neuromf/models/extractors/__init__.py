"""Feature extractors of others: networks whose weights come from the weights folder, behind one interface.

An extractor is called with volumes (B, 1, I, J, K) on the p0-p99.5 scale and returns, for each of its `planes`, float32
features (B, S, D) of S slices; three-dimensional ones have one plane, `volume`, with S = 1.
"""

from neuromf.models.extractors.catalogue import FOREIGN, LPIPS, USER_PREFIX, check_name, load_extractor, load_lpips
from neuromf.models.extractors.extractor import Extractor
from neuromf.models.extractors.lpips_alex import Lpips

__all__ = [
    "FOREIGN",
    "LPIPS",
    "USER_PREFIX",
    "Extractor",
    "Lpips",
    "check_name",
    "load_extractor",
    "load_lpips",
]
