"""The papers' printed numbers as data, exactly as printed, and what recounting them shows.

Nothing is corrected in the tables; `means`, `claims`, `misprints` and `dataset_statements` say where a paper
contradicts itself, the data sets, or the works it quotes. All figures are percent.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import pandas as pd

from vitad.errors import unknown

T1, T3 = "yang2024_table1_dataset_sizes", "yang2024_table3_mvtec_image_auroc"
T4, T5, T6 = "yang2024_table4_mvtec_localization", "yang2024_table5_btad", "yang2024_table6_ablation"
M1, M3 = "mala2023_table1_mvtec_multiclass", "mala2023_table3_visa"
RESULTS = (T3, T4, T5, T6, M1, M3)  # those with a figure for each category, method and metric
DATA = {"mvtec_ad": "MVTec AD", "btad": "BTAD", "visa": "VisA"}
METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pro": "PRO"}
IMAGE, PIXEL, PRO = METRICS
CONVOLUTIONAL = ["AE_SSIM", "L2-CAE", "VAE"]  # Yang & Guo, sec. 4.4.1
EPS = 1e-9  # differences of decimals are not exact


def table(name):
    """A printed table as a DataFrame `paper, table, dataset, category, method, metric, value_percent`.

    The row `category == "average"` is the printed mean; compare with the mean of the rows.
    """
    return _read(name)


def means(paper=None, band=False):
    """Every printed mean beside the mean of its rows; of one paper or of all.

    Returns:
        DataFrame `paper, table, method, metric, printed, recomputed, difference, verdict`. The difference is printed
        minus recomputed. `agrees`: within 0.05. `rounding`: can come from rounding the rows, and rounding or cutting
        off the mean. `not rounding`: cannot. With `band` also `least, most`, the differences that rounding can make.
    """
    rows = _of(paper, pd.concat([table(name) for name in RESULTS]).dropna(subset="value_percent"))
    found = []
    for key, group in rows.groupby(["paper", "table", "method", "metric"], sort=False):
        values = group.set_index("category")["value_percent"]
        printed, cells = values["average"], values.drop("average")
        if len(cells):  # the ablation prints means only
            off = printed - cells.mean()
            about = (printed, round(cells.mean(), 3), round(off, 3), _verdict(off, printed, cells))
            found.append((*key, *about, *_band(printed, cells)))
    columns = ["paper", "table", "method", "metric", "printed", "recomputed", "difference", "verdict", "least", "most"]
    return pd.DataFrame(found, columns=columns)[columns if band else columns[:-2]]


def _verdict(off, printed, cells):
    least, most = _band(printed, cells)
    if abs(off) <= 0.05 + EPS:
        return "agrees"
    return "rounding" if least - EPS <= off <= most + EPS else "not rounding"


def _band(printed, cells):
    """Rows rounded to a grid q shift their mean by q/2 at most; the mean's own grid p adds p/2, or p if cut off."""
    q = 1 if (cells % 1 == 0).all() else 0.1
    p = 1 if q == 1 and printed % 1 == 0 else 0.1
    return -(q / 2 + p), q / 2 + p / 2


def standing(name, metric):
    """Where a paper's own method stands in its table: DataFrame `ours, best_other, by, gap`, one row a category.

    `by` names all methods that share the best other value. The gap is above 0 where ours is best alone, 0 at a tie.
    """
    wide = _wide(name, metric).drop("average")
    ours = wide.pop("Ours")
    best = wide.max(axis=1)
    by = wide.eq(best, axis=0).apply(lambda row: ", ".join(row.index[row]), axis=1)
    return pd.DataFrame({"ours": ours, "best_other": best, "by": by, "gap": (ours - best).round(1)})


def claims(paper):
    """What a paper's text says about its results, beside what its tables give, computed when asked for.

    Claims whose tables are not at hand are left out. Stated means are compared with the mean of the rows. What is
    marked "(not claimed)" a reader may take from the text, which does not say it.

    Returns:
        DataFrame `section, claim, printed, tables, holds` of text, and of bool in the last column.
    """
    if paper not in CLAIMS:
        raise unknown("paper", paper, CLAIMS)
    checked = [claim.check() for claim in [*_levels(paper), *CLAIMS[paper]]]
    frame = pd.DataFrame(checked, columns=["section", "claim", "printed", "tables", "holds"])
    order = frame["section"].replace("Abstract", "").sort_values(kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def misprints(paper):
    """Misprinted equations and wording: DataFrame `place, printed, meant, here` of Markdown, LaTeX between dollars.

    `here` is what vitad does; empty where the method is not in the library. MALA was read from a machine's transcript,
    which may itself have lost a bar or a hat.
    """
    return _of(paper, _read("misprints", dtype=str, keep_default_na=False)).drop(columns="paper")


def dataset_statements(paper):
    """Wrong statements on data sets and on columns taken from elsewhere: DataFrame `place, stated, true, source`."""
    return _of(paper, _read("dataset_statements", dtype=str, keep_default_na=False)).drop(columns="paper")


def _read(name, **options):
    folder = files("vitad") / "reported_tables"
    names = sorted(f.name.removesuffix(".csv") for f in folder.iterdir() if f.name.endswith(".csv"))
    if name not in names:
        raise unknown("table", name, names)
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, **options)


def _of(paper, frame):
    """The rows of one paper; None: all of them."""
    if paper is None:
        return frame
    if paper not in set(frame["paper"]):
        raise unknown("paper", paper, frame["paper"].unique())
    return frame[frame["paper"] == paper].reset_index(drop=True)


def _wide(name, metric):
    """Category x method, with the printed mean as row `average`; methods without this metric are left out."""
    rows = table(name)
    rows = rows[rows["metric"] == metric]
    return rows.pivot(index="category", columns="method", values="value_percent").dropna(axis=1, how="all")


# --- claims: what a paper says, and how to ask its tables ---------------------------------------------------


@dataclass(frozen=True)
class Claim:
    section: str
    claim: str
    printed: str
    tables: Callable  # () -> number, or (lowest, highest) where rounded rows hide which

    def check(self):
        value = self.tables()
        low, high = value if isinstance(value, tuple) else (value, value)
        shown = " to ".join(f"{round(v, 2):g}" for v in dict.fromkeys((low, high)))
        return self.section, self.claim, self.printed, shown, bool(_holds(self.printed, low, high))


def _holds(printed, low, high):
    """A value holds if it rounds to the number printed; `over` wants more than that, `almost all` forgives one."""
    numbers = re.findall(r"\d+\.?\d*", printed)  # "3.5 + 2.3" stands for its sum
    number = sum(map(float, numbers))
    if printed.startswith("over"):
        return low > number + EPS
    if printed.startswith("almost all"):
        return low >= number - 1
    half = 0.5 * 10.0 ** -len(numbers[-1].partition(".")[2]) + EPS  # a half may go either way
    return low - half <= number <= high + half


def _levels(paper):
    """Claims for the levels in `text_stated_values` whose tables are at hand."""
    stated = _read("text_stated_values", dtype=str, keep_default_na=False)
    rows = pd.concat([table(name) for name in RESULTS])
    for s in stated[(stated["paper"] == paper) & (stated["kind"] == "level")].itertuples():
        same = rows[["paper", "dataset", "method", "metric"]].eq([s.paper, s.dataset, s.method, s.metric]).all(axis=1)
        found = rows[same].set_index("category")["value_percent"]
        whole = s.category == "average" and len(found) > 1  # the ablation has no rows to average
        found = found.drop("average") if whole else found[found.index == s.category]
        if len(found):
            what = f"{DATA[s.dataset]}: {METRICS[s.metric]}, {s.category}"
            what += "" if s.method == "Ours" else f" of {s.method}"
            yield Claim(s.section, what, s.value_percent, found.mean)


def _ahead(name, metric, other=None, method="Ours", tied=False):
    """Number of categories where a method beats another one, or all others; `tied` counts equals too."""
    wide = _wide(name, metric).drop("average")
    gap = wide[method] - (wide[other] if other else wide.drop(columns=method).max(axis=1))
    return (gap >= 0).sum() if tied else (gap > 0).sum()


def _leads(name, metric, others=None, recomputed=False):
    """Mean of ours minus that of each other method; means as printed, or of the rows."""
    wide = _wide(name, metric)
    mean = wide.drop("average").mean() if recomputed else wide.loc["average"]
    return (mean["Ours"] - mean.drop("Ours"))[others or slice(None)].round(3)


def _place(name, metric):
    return 1 + (_leads(name, metric) < 0).sum()


def _gains(section, where, name, metric, least, largest, others=None):
    """Two claims: the ends of a range of gains in the mean."""
    what = f"{where}: {METRICS[metric]} gained over {'convolutional autoencoders' if others else 'the others'}"
    return [
        Claim(section, f"{what}, least", least, lambda: _leads(name, metric, others).min()),
        Claim(section, f"{what}, largest", largest, lambda: _leads(name, metric, others).max()),
    ]


def _added(variant, metric):
    """What a row of the ablation gains over its base."""
    mean = _wide(T6, metric).loc["average"]
    return mean[variant] - mean["Base"]


def _ablation(what, variant, *printed):
    """Three claims, one a metric."""
    pairs = zip(METRICS, printed, strict=True)
    return [Claim("4.5", f"{what}, {METRICS[m]}", p, lambda m=m: _added(variant, m)) for m, p in pairs]


def _sizes(*columns):
    """Sum of columns of Table 1, one number a category."""
    return table(T1).set_index("category").drop("total")[list(columns)].sum(axis=1)


CLAIMS = {
    "lee_kang_2022_anovit": [
        Claim(
            "Abstract",
            "MVTec AD: categories above L2-CAE (whole percents, Yang & Guo's Table 3)",
            "10",
            lambda: tuple(_ahead(T3, IMAGE, "L2-CAE", "AnoViT", tied) for tied in (False, True)),
        ),
    ],
    "yang_guo_2024": [
        Claim(
            "Abstract",
            "MVTec AD: image AUROC gained over convolutional autoencoders, mean",
            "about 20",
            lambda: _leads(T3, IMAGE, CONVOLUTIONAL).mean(),
        ),
        Claim(
            "Abstract",
            "data sets whose table of image AUROC has a convolutional autoencoder (L2-CAE)",
            "2",
            lambda: sum("L2-CAE" in _wide(t, IMAGE) for t in (T3, T5)),
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
            lambda: sum(standing(T5, m)["gap"]["01"] > 0 for m in METRICS),
        ),
        Claim(
            "4.4.2 (2)",
            "BTAD: figures above VT-ADL, of all products and metrics",
            "almost all of 9",
            lambda: sum(_ahead(T5, m, "VT-ADL") for m in METRICS),
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
    "chen_2023_mala": [
        Claim(
            "Abstract",
            "VisA: pixel AUROC, average as Table 3 prints it",
            "97.1",
            lambda: _wide(M3, PIXEL)["Ours"]["average"],
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
        Claim("IV-D-1", "MVTec AD: lead over the second, mean image AUROC", "1.9", lambda: _leads(M1, IMAGE).min()),
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
