"""The systems of the field that the book names: when they came out, what they learn from, what they compare."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from vitad.papers import printed

PAINTED, GOOD = "good images and painted damage", "good images"
PIXELS, FEATURES = "pixels", "features"


class System(NamedTuple):
    """A system of the field."""

    name: str
    year: int
    source: str  # where it was published
    learns: str  # from `GOOD` or `PAINTED`
    compares: str  # `PIXELS` or `FEATURES`
    idea: str
    names: tuple[str, ...] = ()  # in the printed tables
    paper: str = ""  # of this book: its name in `printed.PAPERS`


SYSTEMS = (
    System("AnoGAN", 2017, "IPMI", GOOD, PIXELS, "a network that draws good images: its nearest drawing", ("AnoGAN",)),
    System("L2-CAE", 2019, "VISAPP, 372–380", GOOD, PIXELS, "rebuild, squared error", ("L2-CAE",)),
    System("AE-SSIM", 2019, "VISAPP, 372–380", GOOD, PIXELS, "rebuild, structural similarity (SSIM)", ("AE_SSIM",)),
    System("VAE", 2020, "ICLR (VAE-grad)", GOOD, PIXELS, "rebuild, then move the image towards normal", ("VAE",)),
    System("CAVGA", 2020, "ECCV", GOOD, PIXELS, "attention must cover all of a good image", ("CAVGA",)),
    System("Patch SVDD", 2020, "ACCV", GOOD, FEATURES, "learn features in which patches lie close", ("P-SVDD",)),
    System("SCADN", 2021, "AAAI", GOOD, PIXELS, "hide stripes and fill them in", ("SCADN",)),
    System("VT-ADL", 2021, "ISIE", GOOD, PIXELS, "rebuild with a Vision Transformer", ("VT-ADL", "VT_ADL")),
    System("MKD", 2021, "CVPR", GOOD, FEATURES, "a small network imitates a trained one", ("MKD",)),
    System("DFR", 2021, "Neurocomputing 424, 9–22", GOOD, FEATURES, "rebuild features", ("DFR",)),
    System("PaDiM", 2021, "ICPR workshops 2020, LNCS 2021", GOOD, FEATURES, "a Gaussian for each place", ("PaDim",)),
    System("DRAEM", 2021, "ICCV, 8330–8339", PAINTED, PIXELS, "rebuild, then segment", ("DRAEM",)),
    System("CFLOW", 2022, "WACV, 98–107", GOOD, FEATURES, "a density of features", ("CFLOW",)),
    System("PatchCore", 2022, "CVPR", GOOD, FEATURES, "nearest neighbours of patches"),
    System("SSPCAB", 2022, "CVPR", PAINTED, PIXELS, "a block that predicts the middle", ("SSPCAB", "DRAEM+SSPCAB")),
    System("UniAD", 2022, "NeurIPS", GOOD, FEATURES, "rebuild features of all products", ("UniAD",)),
    System("AnoViT", 2022, "IEEE Access 10", GOOD, PIXELS, "rebuild from ViT tokens", ("AnoViT",), "anovit2022"),
    System("JNLD", 2022, "ICME", PAINTED, PIXELS, "damage that is just noticeable", ("JNLD",)),
    System("PMAD", 2023, "AAAI, 4792–4800", GOOD, FEATURES, "predict codes of hidden patches", ("PMAD",)),
    System("OmniAL", 2023, "CVPR, 3924–3933", PAINTED, PIXELS, "one network for all products", ("OmniAL",)),
    System("MALA", 2023, "IEEE Access 11", PAINTED, FEATURES, "masked features to masks", ("Ours",), "mala2023"),
    System("vitmem", 2024, "Sensors 24(8), 2440", GOOD, PIXELS, "rebuild from a memory", ("Ours",), "yang2024"),
    System("ssltok", 2024, "IEEE Access 12", PAINTED, FEATURES, "predict tokens, then segment", (), "kimkwon2024"),
    System("AnomalyDINO", 2025, "WACV", GOOD, FEATURES, "nearest neighbours of DINOv2 tokens"),
    System("Dinomaly", 2025, "CVPR, 20405–20415", GOOD, FEATURES, "rebuild features through dropout"),
)


def table() -> pd.DataFrame:
    """`SYSTEMS` as a table, oldest first."""
    columns = ["name", "year", "source", "learns", "compares", "idea"]
    return pd.DataFrame([{name: getattr(s, name) for name in columns} for s in SYSTEMS])


def rivals() -> dict[str, list[str]]:
    """{paper: names of the systems in its printed tables of results that can be read}, itself left out."""
    found: dict[str, list[str]] = {paper: [] for paper in printed.PAPERS}
    for name in printed.results():
        paper = name.split("-")[0]
        methods = set(printed.table(name)["method"])
        for system in SYSTEMS:
            if methods.intersection(system.names) and system.paper != paper and "Ours" not in system.names:
                found[paper] = list(dict.fromkeys([*found[paper], system.name]))
    return {paper: names for paper, names in found.items() if names}
