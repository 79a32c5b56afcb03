"""What the papers' texts say about their results, beside what their own tables give.

Every claim is computed when asked for. A sentence whose table is not at hand is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from vitad import data
from vitad.errors import unknown
from vitad.metrics import METRICS
from vitad.papers import printed
from vitad.papers.printed import EPS, IMAGE, METRICS_PRINTED, PIXEL, PRO, SIZES, by_method, standing

T3, T4, T5, T6 = "yang2024-3", "yang2024-4", "yang2024-5", "yang2024-6"
M1, M3 = "mala2023-1", "mala2023-3"
CONVOLUTIONAL = ["AE_SSIM", "L2-CAE", "VAE"]  # Yang & Guo, sec. 4.4.1


def claims(paper: str) -> pd.DataFrame:
    """What a paper's text says about its results, beside what its tables give.

    Stated means are compared with the mean of the rows. What is
    marked "(not claimed)" a reader may take from the text, which does not say it.

    Returns
    -------
    DataFrame `section, claim, printed, tables, holds` of text, and of bool in the last column.
    """
    if paper not in CLAIMS:
        raise unknown("paper", paper, CLAIMS)
    checked = [claim.check() for claim in [*_levels(paper), *CLAIMS[paper]]]
    frame = pd.DataFrame(checked, columns=["section", "claim", "printed", "tables", "holds"])
    order = frame["section"].replace("Abstract", "").sort_values(kind="stable").index
    return frame.loc[order].reset_index(drop=True)


# --- claims: what a paper says, and how to ask its tables ---------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper with a number, and how to compute that number from the paper's own tables."""

    section: str
    claim: str
    printed: str
    tables: Callable[[], float | tuple[float, ...]]  # number, or (lowest, highest) where rounded rows hide which

    def check(self) -> tuple[str, str, str, str, bool]:
        """(section, claim, number as printed, number from the tables, whether they agree)."""
        value = self.tables()
        low, high = value if isinstance(value, tuple) else (value, value)
        shown = " to ".join(f"{round(v, 2):g}" for v in dict.fromkeys((low, high)))
        return self.section, self.claim, self.printed, shown, bool(_holds(self.printed, low, high))


def _holds(printed: str, low: float, high: float) -> bool:
    """A value holds if it rounds to the number printed; `over` wants more than that, `almost all` forgives one."""
    numbers = re.findall(r"\d+\.?\d*", printed)  # "3.5 + 2.3" stands for its sum
    number = sum(map(float, numbers))
    if printed.startswith("over"):
        return low > number + EPS
    if printed.startswith("almost all"):
        return low >= number - 1
    half = 0.5 * 10.0 ** -len(numbers[-1].partition(".")[2]) + EPS  # a half may go either way
    return low - half <= number <= high + half


def _levels(paper: str) -> Iterator[Claim]:
    """Claims for the levels in `text_stated_values` whose tables are at hand."""
    stated = printed.read("text-values", dtype=str, keep_default_na=False)
    rows = pd.concat([printed.table(name) for name in printed.results()])
    for s in stated[(stated["paper"] == paper) & (stated["kind"] == "level")].itertuples():
        same = rows[["paper", "dataset", "method", "metric"]].eq([s.paper, s.dataset, s.method, s.metric]).all(axis=1)
        found = rows[same].set_index("category")["value_percent"]
        whole = s.category == "average" and len(found) > 1  # the ablation has no rows to average
        found = found.drop("average") if whole else found[found.index == s.category]
        if len(found):
            what = f"{data.get(s.dataset).title}: {METRICS[s.metric]}, {s.category}"
            what += "" if s.method == "Ours" else f" of {s.method}"
            yield Claim(s.section, what, s.value_percent, found.mean)


def _ahead(name: str, metric: str, other: str | None = None, method: str = "Ours", tied: bool = False) -> int:
    """Number of categories where a method beats another one, or all others; `tied` counts equals too."""
    wide = by_method(name, metric).drop("average")
    gap = wide[method] - (wide[other] if other else wide.drop(columns=method).max(axis=1))
    return (gap >= 0).sum() if tied else (gap > 0).sum()


def _leads(name: str, metric: str, others: list[str] | None = None, recomputed: bool = False) -> pd.Series:
    """Mean of ours minus that of each other method; means as printed, or of the rows."""
    wide = by_method(name, metric)
    mean = wide.drop("average").mean() if recomputed else wide.loc["average"]
    return (mean["Ours"] - mean.drop("Ours"))[others or slice(None)].round(3)


def _place(name: str, metric: str) -> int:
    return 1 + (_leads(name, metric) < 0).sum()


def _gains(
    section: str, where: str, name: str, metric: str, least: str, largest: str, others: list[str] | None = None
) -> list[Claim]:
    """Two claims: the ends of a range of gains in the mean."""
    what = f"{where}: {METRICS[metric]} gained over {'convolutional autoencoders' if others else 'the others'}"
    return [
        Claim(section, f"{what}, least", least, lambda: _leads(name, metric, others).min()),
        Claim(section, f"{what}, largest", largest, lambda: _leads(name, metric, others).max()),
    ]


def _added(variant: str, metric: str) -> float:
    """What a row of the ablation gains over its base."""
    mean = by_method(T6, metric).loc["average"]
    return mean[variant] - mean["Base"]


def _ablation(what: str, variant: str, *printed: str) -> list[Claim]:
    """Three claims, one a metric."""
    pairs = zip(METRICS_PRINTED, printed, strict=True)
    return [Claim("4.5", f"{what}, {METRICS[m]}", p, partial(_added, variant, m)) for m, p in pairs]


def _sizes(*columns: str) -> pd.Series:
    """Sum of columns of Table 1, one number a category."""
    return printed.table(SIZES).set_index("category").drop("total")[list(columns)].sum(axis=1)


CLAIMS = {
    "anovit2022": [
        Claim(
            "Abstract",
            "MVTec AD: categories above L2-CAE (whole percents, Yang & Guo's Table 3)",
            "10",
            lambda: tuple(_ahead(T3, IMAGE, "L2-CAE", "AnoViT", tied) for tied in (False, True)),
        ),
    ],
    "yang2024": [
        Claim(
            "Abstract",
            "MVTec AD: image AUROC gained over convolutional autoencoders, mean",
            "about 20",
            lambda: _leads(T3, IMAGE, CONVOLUTIONAL).mean(),
        ),
        Claim(
            "Abstract",
            "data sets whose table of image AUROC has a convolutional autoencoder to gain over",
            "2",
            lambda: sum(not set(CONVOLUTIONAL).isdisjoint(by_method(t, IMAGE)) for t in (T3, T5)),
        ),
        Claim("4.1", "MVTec AD: normal images", "3629", lambda: _sizes("train_normal", "test_normal").sum()),
        Claim("4.1", "MVTec AD: anomalous images", "1725", lambda: _sizes("test_anomalous").sum()),
        Claim("4.1", "MVTec AD: sizes of images", "2", lambda: _sizes("resolution_px").nunique()),
        Claim("4.4.2 (1)", "MVTec AD: categories where it is best, image AUROC", "9", lambda: _ahead(T3, IMAGE)),
        Claim(
            "4.4.2 (1)",
            "MVTec AD: categories where it is best or as good as the best, image AUROC",
            "9",
            lambda: _ahead(T3, IMAGE, tied=True),
        ),
        *_gains("4.4.2 (1)", "MVTec AD", T3, IMAGE, "14", "28", CONVOLUTIONAL),
        Claim(
            "4.4.2 (1)",
            "MVTec AD: categories localised better than by all others, pixel AUROC",
            "15",
            lambda: _ahead(T4, PIXEL),
        ),
        Claim(
            "4.4.2 (1)",
            "MVTec AD: categories localised better than by all others, PRO",
            "15",
            lambda: _ahead(T4, PRO),
        ),
        *_gains("4.4.2 (1)", "MVTec AD", T4, PIXEL, "2", "18.7"),
        *_gains("4.4.2 (1)", "MVTec AD", T4, PRO, "0.9", "48"),
        Claim("4.4.2 (1)", "MVTec AD: categories above AnoViT, image AUROC", "15", lambda: _ahead(T3, IMAGE, "AnoViT")),
        Claim(
            "4.4.2 (1)", "MVTec AD: categories above VT_ADL, PRO", "almost all of 15", lambda: _ahead(T4, PRO, "VT_ADL")
        ),
        *_gains("4.4.2 (2)", "BTAD", T5, IMAGE, "3.6", "10.5"),
        *_gains("4.4.2 (2)", "BTAD", T5, PIXEL, "0.2", "10.1"),
        *_gains("4.4.2 (2)", "BTAD", T5, PRO, "2", "37"),
        Claim(
            "4.4.2 (2)",
            "BTAD: metrics where it is best on product 01",
            "3",
            lambda: sum(standing(T5, m)["gap"]["01"] > 0 for m in METRICS_PRINTED),
        ),
        Claim(
            "4.4.2 (2)",
            "BTAD: numbers higher than those of VT-ADL, of three products times three metrics",
            "almost all of 9",
            lambda: sum(_ahead(T5, m, "VT-ADL") for m in METRICS_PRINTED),
        ),
        *_ablation("gain of M over the base", "Base + M", "3.5", "8", "20.9"),
        *_ablation("gain of CA over the base", "Base + CA", "2.3", "2.6", "6.1"),
        # The paper does not say that the gains add up; a reader may take them so.
        *_ablation(
            "M and CA together gain the sum of their gains (not claimed)",
            "Base + M + CA (Ours)",
            "3.5 + 2.3",
            "8 + 2.6",
            "20.9 + 6.1",
        ),
        Claim(
            "4.5",
            "of pixel AUROC and PRO, those to which M adds more than CA",
            "2",
            lambda: sum(_added("Base + M", m) > _added("Base + CA", m) for m in (PIXEL, PRO)),
        ),
    ],
    "mala2023": [
        Claim(
            "Abstract",
            "VisA: pixel AUROC, average as Table 3 prints it",
            "97.1",
            lambda: by_method(M3, PIXEL)["Ours"]["average"],
        ),
        Claim(
            "IV-C", "MVTec AD categories with 200 training images", "15", lambda: (_sizes("train_normal") >= 200).sum()
        ),
        Claim(
            "IV-C", "MVTec AD categories with 80 training images", "15", lambda: (_sizes("train_normal") >= 80).sum()
        ),
        Claim(
            "IV-D-1",
            "MVTec AD: lead over the second, capsule image AUROC",
            "6.6",
            lambda: standing(M1, IMAGE)["gap"]["capsule"],
        ),
        Claim(
            "IV-D-1",
            "MVTec AD: lead over the second, pill image AUROC",
            "2.8",
            lambda: standing(M1, IMAGE)["gap"]["pill"],
        ),
        Claim(
            "IV-D-1",
            "MVTec AD: lead over the second, mean image AUROC; means as printed",
            "1.9",
            lambda: _leads(M1, IMAGE).min(),
        ),
        Claim("IV-D-1", "MVTec AD: place by mean image AUROC", "1", lambda: _place(M1, IMAGE)),
        Claim("IV-D-1", "MVTec AD: place by mean pixel AUROC", "1", lambda: _place(M1, PIXEL)),
        Claim("IV-D-1", "MVTec AD: categories where it is best, pixel AUROC", "8", lambda: _ahead(M1, PIXEL)),
        Claim(
            "IV-D-2",
            "VisA: lead over the second, mean pixel AUROC; means recomputed, means as printed",
            "over 1.1",
            lambda: tuple(sorted(_leads(M3, PIXEL, recomputed=again).min() for again in (True, False))),
        ),
        Claim(
            "IV-D-2",
            "VisA: of OmniAL and UniAD, those below it in mean image AUROC",
            "2",
            lambda: (_leads(M3, IMAGE, ["OmniAL", "UniAD"]) > 0).sum(),
        ),
        Claim("IV-D-2", "VisA: place by mean image AUROC", "2", lambda: _place(M3, IMAGE)),
        Claim("V-B", "VisA: state of the art, place by mean image AUROC", "1", lambda: _place(M3, IMAGE)),
        Claim("V-B", "VisA: state of the art, place by mean pixel AUROC", "1", lambda: _place(M3, PIXEL)),
    ],
}
