"""The papers' tables are whole, and what is said about them follows from them."""

import re

import numpy as np
import pandas as pd
import pytest

from vitad import methods
from vitad.errors import UserError
from vitad.metrics import METRICS
from vitad.papers import claims as papers_claims
from vitad.papers import printed as numbers
from vitad.papers.claims import CLAIMS, M1, M3, T3, T4, T5, T6, claims
from vitad.papers.printed import IMAGE, PIXEL, PRO
from vitad.papers.printed import SIZES as T1

# table: (rows, methods, metrics, categories with the average)
SHAPES = {
    T3: (128, 8, 1, 16),
    T4: (224, 7, 2, 16),
    T5: (60, 5, 3, 4),
    T6: (12, 4, 3, 1),
    M1: (224, 7, 2, 16),
    M3: (130, 5, 2, 13),
}
# Cells that the papers print as a dash: no pixel AUROC of two methods, no PRO of one.
DASHES = {T4: {("MKD", PIXEL), ("VT_ADL", PIXEL)}, T5: {("P-SVDD", PRO)}}
# Printed means that are off by more than 0.05, with the difference, and those that rounding does not explain.
OFF = {
    ("table3", "Ours", IMAGE): -0.193,
    ("table3", "VAE", IMAGE): 1.067,
    ("table3", "AnoGAN", IMAGE): -0.800,
    ("table3", "AE_SSIM", IMAGE): -0.467,
    ("table3", "AnoViT", IMAGE): -0.467,
    ("table3", "CAVGA", IMAGE): -0.400,
    ("table3", "L2-CAE", IMAGE): -0.333,
    ("table4", "SCADN", PRO): -0.587,
    ("table4", "SCADN", PIXEL): 0.053,
    ("table4", "AnoGAN", PRO): -0.400,
    ("table4", "AE_SSIM", PIXEL): 0.133,
    ("table4", "AE_SSIM", PRO): -0.060,
    ("table5", "DRAEM", PIXEL): -0.267,
    ("table5", "P-SVDD", PIXEL): -0.067,
}
UNEXPLAINED = {
    ("table3", "Ours", IMAGE),
    ("table3", "VAE", IMAGE),
    ("table4", "SCADN", PRO),
    ("table4", "AnoGAN", PRO),
    ("table5", "DRAEM", PIXEL),
}
# What each paper says and its tables do not give: section, printed, what they give.
BROKEN = {
    "yang2024": [
        ("Abstract", "2", "1"),
        ("4.1", "3629", "4096"),
        ("4.1", "1725", "1258"),
        ("4.1", "2", "6"),
        ("4.4.1", "91.2", "91.39"),
        ("4.4.2 (1)", "9", "8"),
        ("4.4.2 (1)", "15", "6"),
        ("4.4.2 (1)", "15", "5"),
        ("4.4.2 (1)", "15", "14"),
        ("4.4.2 (2)", "10.5", "9.5"),
        ("4.5", "20.9", "10.9"),
        ("4.5", "3.5 + 2.3", "9"),
        ("4.5", "8 + 2.6", "9.2"),
        ("4.5", "20.9 + 6.1", "12.7"),
    ],
    "mala2023": [
        ("Abstract", "98.", "98.64"),
        ("Abstract", "97.1", "97.2"),
        ("IV-C", "15", "14"),
        ("IV-C", "15", "14"),
        ("IV-D-2", "over 1.1", "1.02 to 1.1"),
        ("IV-D-2", "2", "1"),
        ("V-B", "1", "2"),
    ],
    "anovit2022": [],
}


@pytest.mark.parametrize("name", SHAPES)
def test_tables_are_whole(name):
    table = numbers.table(name)
    counts = [len(table), *(table[c].nunique() for c in ("method", "metric", "category"))]
    assert tuple(counts) == SHAPES[name] and counts[0] == np.prod(counts[1:])
    assert not table.duplicated(["category", "method", "metric"]).any()
    empty = table[table["value_percent"].isna()]
    assert set(zip(empty["method"], empty["metric"], strict=True)) == DASHES.get(name, set())
    assert len(empty) == len(DASHES.get(name, ())) * counts[3]
    assert table["value_percent"].dropna().between(15, 100).all()
    assert (table["value_percent"] * 10 % 1).dropna().round(6).isin([0, 1]).all(), "more than one decimal"


def test_table_of_sizes_adds_up():
    sizes = numbers.table(T1).set_index("category").drop(columns="resolution_px").select_dtypes("number")
    assert len(sizes) == 16 and (sizes.drop("total").sum() == sizes.loc["total"]).all()


def test_printed_means_against_their_rows():
    means = numbers.means().set_index(["paper", "table", "method", "metric"])
    assert len(means) == 58 and means.index.is_unique and means.notna().all(axis=None)
    assert means["verdict"].value_counts().to_dict() == {"agrees": 44, "rounding": 9, "not rounding": 5}
    off = means[means["verdict"] != "agrees"]
    assert set(off.index.get_level_values("paper")) == {"yang2024"}
    off = off.droplevel("paper")
    assert off["difference"].to_dict() == pytest.approx(OFF, abs=6e-4)
    assert set(off.index[off["verdict"] == "not rounding"]) == UNEXPLAINED
    assert means["recomputed"]["mala2023", "table3", "Ours", PIXEL] == 97.150
    assert means["recomputed"]["yang2024", "table3", "Ours", IMAGE] == 91.393


def test_the_band_of_rounding_holds_all_means_but_those_that_it_cannot_explain():
    means = numbers.means(band=True)
    inside = means["difference"].between(means["least"] - 1e-6, means["most"] + 1e-6)
    assert (inside == (means["verdict"] != "not rounding")).all()
    assert means.drop(columns=["least", "most"]).equals(numbers.means())
    assert means[["least", "most"]].round(9).drop_duplicates().to_numpy().tolist() == [
        [-1.5, 1.0],
        [-0.15, 0.1],
        [-0.6, 0.55],
    ]


def test_means_of_one_paper():
    assert set(numbers.means("mala2023")["paper"]) == {"mala2023"}
    assert [len(numbers.means(p)) for p in ("yang2024", "mala2023")] == [34, 24]


def test_verdict_knows_rounding_from_a_wrong_mean():
    whole, tenths = pd.Series([50.0, 61.0, 70.0]), pd.Series([50.2, 61.3, 70.4])  # means 60.333 and 60.633
    for printed, cells, verdict in [
        (60.3, whole, "agrees"),
        (60.0, whole, "rounding"),
        (59.0, whole, "rounding"),  # rows rounded up, the mean cut off
        (58.0, whole, "not rounding"),
        (62.0, whole, "not rounding"),
        (60.6, tenths, "agrees"),
        (60.5, tenths, "rounding"),
        (60.4, tenths, "not rounding"),
        (60.8, tenths, "not rounding"),
    ]:
        assert numbers._verdict(printed - cells.mean(), printed, cells) == verdict, printed


@pytest.mark.parametrize(
    "name, metric, alone, tied, beaten",
    [
        (T3, IMAGE, 8, 1, 6),
        (T4, PIXEL, 6, 0, 9),
        (T4, PRO, 5, 0, 10),
        (T5, IMAGE, 2, 0, 1),
        (T5, PIXEL, 2, 0, 1),
        (T5, PRO, 2, 1, 0),
        (M1, IMAGE, 5, 3, 7),
        (M1, PIXEL, 8, 1, 6),
        (M3, IMAGE, 2, 0, 10),
        (M3, PIXEL, 5, 0, 7),
    ],
)
def test_standing_counts_ties_apart(name, metric, alone, tied, beaten):
    gap = numbers.standing(name, metric)["gap"]
    assert ((gap > 0).sum(), (gap == 0).sum(), (gap < 0).sum()) == (alone, tied, beaten)


def test_standing_names_who_is_ahead():
    table = numbers.standing(T3, IMAGE)
    assert table.loc["screw"].tolist() == [100, 100, "AnoViT, L2-CAE", 0]
    assert table["by"][["leather", "pill", "transistor"]].tolist() == ["MKD", "CAVGA", "L2-CAE"]
    assert numbers.standing(T4, PIXEL)["gap"]["toothbrush"] == -9.1


@pytest.mark.parametrize("paper", CLAIMS)
def test_claims_that_the_tables_do_not_bear_out(paper):
    found = claims(paper)
    assert found.columns.tolist() == ["section", "claim", "printed", "tables", "holds"]
    assert found["holds"].dtype == bool and not found.duplicated(["section", "claim"]).any()
    text = found.drop(columns="holds")
    assert text.map(lambda cell: isinstance(cell, str) and cell not in ("", "nan")).all(axis=None)
    broken = found[~found["holds"]]
    assert list(broken[["section", "printed", "tables"]].itertuples(index=False, name=None)) == BROKEN[paper]


def test_claims_that_hold():
    yang = claims("yang2024").set_index(["section", "claim"])
    tied = "MVTec AD: categories where it is best or as good as the best, image AUROC"
    assert yang.loc[("4.4.2 (1)", tied), "tables"] == "9"
    assert yang.loc[("4.5", "gain of CA over the base, PRO"), "tables"] == "6.1"
    anovit = claims("anovit2022")
    assert anovit["tables"].item() == "9 to 11" and anovit["holds"].item()


@pytest.mark.parametrize("paper", ["yang2024", "mala2023"])
def test_no_stated_number_is_left_out(paper):
    """Gains and levels in the text that concern a table at hand all stand among the claims of their section."""
    stated = numbers.read("text-values", dtype=str, keep_default_na=False)
    stated = stated[(stated["paper"] == paper) & (stated["value_percent"] != "")]
    stated = stated[stated["dataset"].isin(["mvtec", "btad", "visa"]) & ~stated["section"].eq("IV-E")]
    found = claims(paper)
    listed = set(zip(found["section"], found["printed"].str.removeprefix("over "), strict=True))
    assert len(stated) > 20 and set(zip(stated["section"], stated["value_percent"], strict=True)) <= listed


def scrambled(seed):
    """`numbers.table` with other numbers, other methods and other sizes in it."""
    original = numbers.table

    def table(name):
        rng = np.random.default_rng(seed)
        frame = original(name)
        for column in frame.select_dtypes("number"):
            frame[column] = rng.uniform(10, 100 if column == "value_percent" else 300, len(frame)).round(1)
        if name == T5:  # a convolutional autoencoder on BTAD
            frame["method"] = frame["method"].replace("P-SVDD", "L2-CAE")
        return frame

    return table


def test_every_claim_follows_the_tables(monkeypatch):
    for paper in CLAIMS:
        before = claims(paper)
        moved = np.zeros(len(before), bool)
        for seed in range(4):
            with monkeypatch.context() as patch:
                patch.setattr(numbers, "table", scrambled(seed))
                after = claims(paper)
            assert after["claim"].equals(before["claim"])
            moved |= after["tables"] != before["tables"]
        assert moved.all(), before["claim"][~moved].tolist()


@pytest.mark.parametrize(
    "printed, value, holds",
    [
        ("37", 36.9, True),
        ("9", 8, False),
        ("98.", 98.64, False),
        ("97.1", 97.15, True),
        ("97.2", 97.15, True),
        ("97.1", 97.2, False),
        ("about 20", 20.2, True),
        ("over 1.1", 1.1, False),
        ("over 1.1", 1.2, True),
        ("almost all of 15", 14, True),
        ("almost all of 15", 13, False),
        ("3.5 + 2.3", 5.8, True),
        ("3.5 + 2.3", 9.0, False),
    ],
)
def test_what_a_printed_number_covers(printed, value, holds):
    assert papers_claims._holds(printed, value, value) is holds


PAPERS = {"yang2024": "vitmem", "mala2023": "mala"}


@pytest.mark.parametrize("paper, method", PAPERS.items())
def test_misprints_are_text_for_a_markdown_table(paper, method):
    misprints = numbers.misprints(paper)
    assert misprints.columns.tolist() == ["place", "printed", "meant", "here"] and len(misprints) > 10
    assert (misprints[["place", "printed", "meant"]] != "").all(axis=None)
    for cell in misprints.to_numpy().ravel():
        assert "|" not in cell and "\n" not in cell and cell.count("$") % 2 == 0, cell
    built = method in methods.METHODS
    assert ((misprints["here"] != "") == built).all(), (
        f"misprints.csv: column `here` says what {method} does, once built"
    )


def test_misprints_name_settings_that_exist():
    here = " ".join(numbers.misprints("yang2024")["here"])
    settings = methods.get("vitmem").Settings()
    for name in ("items", "lambda_ssim", "entropy", "ca_position"):
        assert f"`{name}" in here and hasattr(settings, name)
    assert (settings.entropy, settings.ca_position) == ("corrected", "after_memory")


@pytest.mark.parametrize("paper", PAPERS)
def test_wrong_statements_say_where_to_look(paper):
    statements = numbers.dataset_statements(paper)
    assert statements.columns.tolist() == ["place", "stated", "true", "source"] and len(statements) > 5
    assert (statements != "").all(axis=None)
    assert not statements.map(lambda cell: "|" in cell or "\n" in cell).any(axis=None)


def test_wrong_statements_agree_with_the_table_of_sizes():
    sizes = numbers.table(T1).set_index("category")
    total, sizes = sizes.loc["total"], sizes.drop("total")
    first, second, grey = numbers.dataset_statements("yang2024")["true"][:3]
    assert f"{total['train_normal'] + total['test_normal']:,} normal" in first
    assert f"{total['test_anomalous']:,} anomalous" in first
    assert all(f"{px:.0f}" in second for px in sizes["resolution_px"].unique())
    counts = sizes.loc[["grid", "screw", "zipper"], ["train_normal", "test_normal", "test_anomalous"]]
    assert f"{counts.to_numpy().sum():,} are grey" in grey
    mala = " ".join(numbers.dataset_statements("mala2023")["true"])
    for n in (200, 80):
        assert f"26 x {n} + 60 = {26 * n + sizes['train_normal']['toothbrush']:,}" in mala


def test_leads_over_uniad_as_its_authors_publish_it():
    statements = numbers.dataset_statements("mala2023").set_index("place")
    text = statements.loc["Table 1, column UniAD", "true"]
    means = {m: numbers.by_method(M1, m).loc["average", ["Ours", "UniAD"]] for m in (PIXEL, IMAGE)}
    for metric, published in ((PIXEL, 97.0), (IMAGE, 97.6)):
        name, (ours, stated) = METRICS[metric].removesuffix(" AUROC"), means[metric]
        assert (
            f"{name} AUROC of {published}" in text and f"{stated}" in statements.loc["Table 1, column UniAD", "stated"]
        )
        assert f"by {ours - published:.1f}" in text and f"not {ours - stated:.1f}" in text


def test_claims_can_be_read_one_by_one():
    """In any order, and without the others: no line leans on the one before it."""
    for paper in CLAIMS:
        assert not [c for c in claims(paper)["claim"] if re.search(r"\b(the same|such)\b", c)]


@pytest.mark.parametrize("ask", [numbers.means, claims, numbers.misprints, numbers.dataset_statements])
def test_unknown_papers_are_refused(ask):
    with pytest.raises(UserError, match="unknown paper 'yang_2024'. Did you mean 'yang2024'"):
        ask("yang_2024")


def test_unknown_tables_are_refused():
    with pytest.raises(UserError, match="unknown table"):
        numbers.standing("table3", IMAGE)
