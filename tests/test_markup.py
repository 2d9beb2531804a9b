"""Plans and scores in a notebook: small tables in which names are text."""

from __future__ import annotations

from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores
from nnunet_lite.markup import html_table
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.planner import make_plan
from nnunet_lite.planning.schema import Statistics
from nnunet_lite.planning.show import plan_rows

EVIL = "<script>alert(1)</script>"


def test_a_table_is_escaped() -> None:
    text = html_table(EVIL, [("a", EVIL), (EVIL, "1")], [EVIL])
    assert "<script" not in text and text.count("&lt;script&gt;") == 4
    assert text.count("<tr>") == 2 and text.count("<th ") == 2 and text.count("<td ") == 2


def test_a_plan_shows_its_configurations() -> None:
    statistics = Statistics(mean=1, median=1, std=1, min=0, max=2, percentile_00_5=0, percentile_99_5=2)
    taken = Fingerprint(((1.0, 1.0, 1.0),) * 5, ((40, 50, 36),) * 5, 1.0, (statistics,))
    labels = Labels(names={"background": 0, EVIL: 1})
    plan = make_plan(taken, f"Task {EVIL}", ("MRI",), labels)
    text = plan._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text
    for row in plan_rows(plan):
        assert all(f">{cell}</td>" in text for cell in row)
    assert "3d_fullres: spacing is the median of the data set" in text


def test_scores_show_what_their_table_says() -> None:
    import numpy as np

    labels, draws = Labels(names={"background": 0, "a": 1, EVIL: 2}), np.random.default_rng(0)
    rows = [
        CaseScore(str(i), None, None, score_case(*draws.integers(0, 3, (2, 6, 6, 6)), labels, (1.0, 1.0, 1.0)))
        for i in range(3)
    ]
    scores = Scores(tuple(rows), labels, notes=("a note",))
    text = scores._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text and "a note" in text and "3 cases" in text
    for line in scores.lines()[1:]:
        assert all(f">{cell}</td>" in text for cell in line[1:])
    assert scores.to_text().splitlines()[0].split() == " ".join(scores.lines()[0]).split()
