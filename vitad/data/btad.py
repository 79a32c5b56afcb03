"""BTAD (Mishra et al. 2021, VT-ADL): three products, 2,540 images, the split by folder.

{01,02,03}/train/ok    {01,02,03}/test/{ok,ko}    {01,02,03}/ground_truth/ko

The masks of 01 have another suffix than its images. Numbers have gaps. Some masks of 02 and 03 hold no 255: what
is not zero counts, and an image whose mask is empty stays anomalous. 03 is not square.
"""

from vitad.data import folder

PUBLISHED = {
    "01": {("train", "good"): 400, ("test", "good"): 21, ("test", "ko"): 49},
    "02": {("train", "good"): 399, ("test", "good"): 30, ("test", "ko"): 200},
    "03": {("train", "good"): 1000, ("test", "good"): 400, ("test", "ko"): 41},
}
KNOWN = {}


def scan(root, category):
    """See `folder.scan`."""
    return folder.scan(root, category, good="ok")


def records(root, category):
    """(train, test) lists of `Record` of one product."""
    return folder.records(root, category, good="ok")
