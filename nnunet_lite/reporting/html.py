"""The report of a dataset: one HTML page that contains everything it shows and never uses the network.

Read it from top to bottom: read the workspace (material.py), draw the cases (pictures.py), turn both into the contents
of each section (sections.py, figures.py), and fill templates/report.html.j2.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.files import write_text
from nnunet_lite.reporting import sections
from nnunet_lite.reporting.material import Material, read_material
from nnunet_lite.reporting.pictures import Gallery, draw_cases
from nnunet_lite.workspace import Paths

PAGE = "report.html"
_PLANE_SIZE = 240  # pixels on the page along the longer side of a picture


def write_report(paths: Paths, output: Path) -> Path:
    """Write the report of a planned dataset, whatever stage it has reached.

    Raises
    ------
    UserError : the dataset is not planned, or one of its files is broken.
    """
    material = read_material(paths)
    for note in material.notes:
        log.warn(note)
    write_text(output, render_page(material, draw_cases(material)))
    return output


def render_page(material: Material, gallery: Gallery) -> str:
    """Fill the template. It escapes all that comes from the data; its CSP stops every script but report.js."""
    environment = Environment(
        loader=PackageLoader("nnunet_lite.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters |= {"page_size": _page_size, "errors": _error_outlines}
    script, style = _read_source("report.js"), _read_source("report.css")
    return environment.get_template("report.html.j2").render(
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=material.paths.name,
        version=nnunet_lite.__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        labels=material.dataset.labels.region_names,
        overview=sections.overview_section(material, gallery),
        data=sections.data_section(material, gallery),
        plan=sections.plan_section(material),
        trainings=sections.training_section(material),
        models=sections.scores_section(material, gallery),
        comparison=sections.comparison_section(material),
        costs=sections.costs_section(material),
        settings=sections.settings_section(material),
        page_data=sections.page_data(material, gallery),
    )


def _read_source(name: str) -> str:
    """A file of this package that goes into the page as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _page_size(mm: list[float]) -> tuple[float, float]:
    """Width and height on the page of a picture of a size in mm."""
    return round(_PLANE_SIZE * mm[0] / max(mm), 1), round(_PLANE_SIZE * mm[1] / max(mm), 1)


def _error_outlines(plane: dict[str, Any]) -> list[str]:
    """For each region both outlines in one path; filled by the even-odd rule, it shows where they differ."""
    reference, prediction = dict(plane["reference"]), dict(plane["prediction"])
    return [reference.get(i, "") + prediction.get(i, "") for i in sorted({*reference, *prediction})]
