"""MVTec AD (Bergmann et al. 2019, CVPR): 15 categories, 5,354 images, the split by folder.

The layout of `vitad.data.sets.folder`, with masks `NNN_mask.png` of 0 and 255. The images of grid, screw and zipper are
grey; toothbrush has only 60 for training. Papers write "Metal nut" where the folder is `metal_nut`.
"""

from vitad.data.dataset import Source
from vitad.data.sets.folder import MVTecLayout


def _counts(train: int, good: int, **defects: int) -> dict[tuple[str, str], int]:
    """Images by part and kind: those for training, then the test images, good ones first."""
    return {("train", "good"): train, ("test", "good"): good} | {("test", k): n for k, n in defects.items()}


class MVTec(MVTecLayout):
    """The layout is named after this data set."""

    name = "mvtec"
    title = "MVTec AD"
    source = Source(
        page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
        licence="CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use",
        url="https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/420938113-1629952094/"
        "mvtec_anomaly_detection.tar.xz",
        checksum="sha256:cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        citation="Bergmann, Fauser, Sattlegger, Steger: MVTec AD - A Comprehensive Real-World Dataset for Unsupervised "
        "Anomaly Detection. CVPR 2019",
    )
    known = {"empty masks": 0}
    textures = frozenset({"carpet", "grid", "leather", "tile", "wood"})
    published = {
        "bottle": _counts(209, 20, broken_large=20, broken_small=22, contamination=21),
        "cable": _counts(
            224,
            58,
            bent_wire=13,
            cable_swap=12,
            combined=11,
            cut_inner_insulation=14,
            cut_outer_insulation=10,
            missing_cable=12,
            missing_wire=10,
            poke_insulation=10,
        ),
        "capsule": _counts(219, 23, crack=23, faulty_imprint=22, poke=21, scratch=23, squeeze=20),
        "carpet": _counts(280, 28, color=19, cut=17, hole=17, metal_contamination=17, thread=19),
        "grid": _counts(264, 21, bent=12, broken=12, glue=11, metal_contamination=11, thread=11),
        "hazelnut": _counts(391, 40, crack=18, cut=17, hole=18, print=17),
        "leather": _counts(245, 32, color=19, cut=19, fold=17, glue=19, poke=18),
        "metal_nut": _counts(220, 22, bent=25, color=22, flip=23, scratch=23),
        "pill": _counts(
            267, 26, color=25, combined=17, contamination=21, crack=26, faulty_imprint=19, pill_type=9, scratch=24
        ),
        "screw": _counts(
            320, 41, manipulated_front=24, scratch_head=24, scratch_neck=25, thread_side=23, thread_top=23
        ),
        "tile": _counts(230, 33, crack=17, glue_strip=18, gray_stroke=16, oil=18, rough=15),
        "toothbrush": _counts(60, 12, defective=30),
        "transistor": _counts(213, 60, bent_lead=10, cut_lead=10, damaged_case=10, misplaced=10),
        "wood": _counts(247, 19, color=8, combined=11, hole=10, liquid=10, scratch=21),
        "zipper": _counts(
            240,
            32,
            broken_teeth=19,
            combined=16,
            fabric_border=17,
            fabric_interior=16,
            rough=17,
            split_teeth=18,
            squeezed_teeth=16,
        ),
    }


DATASET = MVTec()
