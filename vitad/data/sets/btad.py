"""BTAD (Mishra et al. 2021, VT-ADL): three products, 2,540 images, the split by folder.

{01,02,03}/train/ok    {01,02,03}/test/{ok,ko}    {01,02,03}/ground_truth/ko

The masks of 01 have another suffix than its images. Numbers have gaps. Some masks of 02 and 03 hold no 255: what
is not zero counts, and an image whose mask is empty stays anomalous. 03 is not square.
"""

from vitad.data.dataset import Source
from vitad.data.sets.folder import MVTecLayout


class BTAD(MVTecLayout):
    """The three products are the categories `01`, `02` and `03`."""

    name = "btad"
    title = "BTAD"
    good = "ok"
    source = Source(
        page="https://github.com/pankajmishra000/VT-ADL",
        licence="CC BY-SA 4.0 by its authors' read-me, CC BY-NC-SA 4.0 "
        "(https://creativecommons.org/licenses/by-nc-sa/4.0/) by anomalib: take the stricter one, not for commercial "
        "use",
        url="https://avires.dimi.uniud.it/papers/btad/btad.zip",
        checksum="sha256:461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        citation="Mishra, Verk, Fornasier, Piciarelli, Foresti: VT-ADL: A Vision Transformer Network for Image Anomaly "
        "Detection and Localization. ISIE 2021",
    )
    published = {
        "01": {("train", "good"): 400, ("test", "good"): 21, ("test", "ko"): 49},
        "02": {("train", "good"): 399, ("test", "good"): 30, ("test", "ko"): 200},
        "03": {("train", "good"): 1000, ("test", "good"): 400, ("test", "ko"): 41},
    }
    spellings = {"1": "01", "2": "02", "3": "03"}


DATASET = BTAD()
