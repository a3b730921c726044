"""The categories of T2I-CompBench, and which of upstream's scorers judges each."""

from dataclasses import dataclass
from typing import Literal

Category = Literal[
    "color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"
]

TABLE: tuple[Category, ...] = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
"""Those of the TACA paper, in the order of its table; the other two are T2I-CompBench++'s."""


@dataclass(frozen=True)
class Metric:
    """One of upstream's scorers.

    name: for tables. folder: where it writes its result, in the category's folder.
    """

    name: str
    folder: str


BLIP_VQA = Metric("BLIP-VQA", "annotation_blip")
CLIP_SCORE = Metric("CLIPScore", "annotation_clip")

METRICS: dict[str, Metric] = {
    "color": BLIP_VQA,
    "shape": BLIP_VQA,
    "texture": BLIP_VQA,
    "spatial": Metric("UniDet", "labels/annotation_obj_detection_2d"),
    "3d_spatial": Metric("UniDet", "labels/annotation_obj_detection_3d"),
    "numeracy": Metric("UniDet", "annotation_num"),
    "non_spatial": CLIP_SCORE,
    "complex": Metric("3-in-1", "annotation_3_in_1"),
}
