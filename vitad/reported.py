"""The papers' printed numbers, as data, exactly as printed: misprinted averages are not corrected here."""

from importlib.resources import files

import pandas as pd

from vitad.errors import unknown


def table(name):
    """A printed table as a DataFrame `paper, table, dataset, category, method, metric, value_percent`.

    The row `category == "average"` is the printed mean; compare with the mean of the rows.
    """
    folder = files("vitad") / "reported_tables"
    names = sorted(f.name.removesuffix(".csv") for f in folder.iterdir() if f.name.endswith(".csv"))
    if name not in names:
        raise unknown("table", name, names)
    with (folder / f"{name}.csv").open() as file:
        return pd.read_csv(file)
