"""What the book says of itself, from book/facts.yml: the files that repeat it, and the settings of a published book.

python book/facts.py     writes CITATION.cff, .zenodo.json and codemeta.json
"""

import json
import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import yaml

import vitad

ROOT = Path(__file__).resolve().parents[1]
CREATIVE_COMMONS = "https://creativecommons.org/licenses/by/4.0/"


def address(text: str) -> str:
    """Type of an option that is the address of a page."""
    if not re.fullmatch(r"https?://[\w.:-]+(/[\w.~-]+)*/?", text):
        raise ValueError("is not an address such as https://owner.github.io/name")
    return text.rstrip("/")


def repository(text: str) -> str:
    """Type of an option that is the address of a repository."""
    if len(urlsplit(address(text)).path.strip("/").split("/")) != 2:
        raise ValueError("is not the address of a repository, such as https://github.com/owner/name")
    return text.rstrip("/").removesuffix(".git")


def facts(**given: str) -> dict:
    """Those of the file, with `repository` and `site` as given, and what is known without it: version and commit."""
    found = yaml.safe_load((ROOT / "book" / "facts.yml").read_text()) | given
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found | {"version": vitad.__version__, "commit": git.stdout.strip()}


def citation(f: dict) -> str:
    """CITATION.cff, which GitHub offers as "cite this repository"."""
    entries = {
        "cff-version": "1.2.0",
        "message": "If you use this book or its library, please cite it, and the paper whose method you used.",
        "type": "software",
        "title": f"{f['title']}, {f['subtitle']}",
        "version": f["version"],
        "license": f["code_licence"],
        "authors": [{"name": name} for name in f["authors"]],
        "abstract": f["abstract"],
        "keywords": f["keywords"],
        "repository-code": f["repository"],
        "url": f["site"],
    }
    return yaml.safe_dump({k: v for k, v in entries.items() if v}, sort_keys=False, width=110, allow_unicode=True)


def zenodo(f: dict) -> str:
    """.zenodo.json, for the archive of a release."""
    entries = {
        "title": f"{f['title']}, {f['subtitle']}",
        "upload_type": "software",
        "version": f["version"],
        "description": f["abstract"],
        "creators": [{"name": name} for name in f["authors"]],
        "license": f["code_licence"],
        "notes": f"The text of the book is under {f['text_licence']}. Photographs keep the licences of their owners.",
        "keywords": f["keywords"],
    }
    return json.dumps(entries, indent=2) + "\n"


def codemeta(f: dict) -> str:
    """codemeta.json, for catalogues of research software."""
    entries = {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": f["title"],
        "description": f["abstract"],
        "version": f["version"],
        "license": f"https://spdx.org/licenses/{f['code_licence']}",
        "author": [{"@type": "Organization", "name": name} for name in f["authors"]],
        "programmingLanguage": "Python",
        "keywords": f["keywords"],
        "codeRepository": f["repository"],
        "url": f["site"],
    }
    return json.dumps({k: v for k, v in entries.items() if v}, indent=2) + "\n"


FILES = {"CITATION.cff": citation, ".zenodo.json": zenodo, "codemeta.json": codemeta}


def published(config: dict, f: dict) -> dict:
    """Settings of Jupyter Book for these facts; without a repository and a site, only the footer is added."""
    html, sphinx = dict(config["html"]), dict(config["sphinx"])
    settings = sphinx["config"] | {"vitad_facts": f}
    changed = {"html": html, "sphinx": sphinx}
    if f["repository"]:
        changed["repository"] = {"url": f["repository"], "branch": f["branch"], "path_to_book": ""}
        changed["launch_buttons"] = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org"}
        if urlsplit(f["repository"]).netloc == "github.com":  # all that Colab opens
            changed["launch_buttons"]["colab_url"] = "https://colab.research.google.com"
        html |= {"use_repository_button": True, "use_issues_button": True, "use_edit_page_button": True}
    if f["site"]:
        html["baseurl"] = f["site"] + "/"
        sphinx["extra_extensions"] = [
            *sphinx["extra_extensions"],
            "sphinxext.opengraph",
            "sphinx_sitemap",
            "notfound.extension",
        ]
        settings |= {
            "ogp_site_url": f["site"] + "/",
            "ogp_site_name": f["title"],
            "ogp_description_length": 180,
            "ogp_social_cards": {"image": "results/intro.png", "image_mini": "book/_static/logo.png"},
            "sitemap_url_scheme": "{link}",
            "sitemap_show_lastmod": False,  # the built source is in no history
            "notfound_urls_prefix": urlsplit(f["site"]).path + "/",
        }
    sphinx["config"] = settings
    return config | changed


def installing_cell(f: dict) -> str:
    """First cell of a notebook in Colab: the library as it was when the book was built."""
    return (
        "# Colab does not have the library: this installs it as it was when the book was built.\n"
        f'%pip install -q "vitad[offline] @ git+{f["repository"]}@{f["commit"]}" ipywidgets pandas seaborn itables'
    )


if __name__ == "__main__":
    for name, text in FILES.items():
        (ROOT / name).write_text(text(facts()))
